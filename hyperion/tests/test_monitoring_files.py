"""The figures of a run: written line by line, read whatever a crash left, drawn."""

from __future__ import annotations

import pytest

from hyperion.monitoring.metrics import MetricsFile
from hyperion.monitoring.plot import draw_loss_curve, smoothed


@pytest.fixture
def file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 4.0 - step, "note": "naïve"})
    return file


def test_half_a_line_is_neither_read_nor_kept(file):
    with file.path.open("ab") as raw:
        raw.write(b'{"step": 4, "loss": 0.12')  # of 0.1234: valid digits, the wrong number
    assert [line["step"] for line in file.read()] == [1, 2, 3]
    file.append({"step": 4, "loss": 0.5})
    assert [line["loss"] for line in file.read()] == [3.0, 2.0, 1.0, 0.5]
    assert file.path.read_text(encoding="utf-8").count("\n") == 4


def test_separators_that_unicode_calls_line_ends_are_text(file):
    text = "a\u2028b\u2029c\u0085d\x0be\rf\ng"
    file.append({"step": 4, "generated": text})
    file.cut_to(file.size())
    assert [line.get("generated") for line in file.read()] == [None, None, None, text]


def test_half_of_the_very_first_line_is_no_obstacle(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text('{"step": 1')
    assert file.read() == []
    file.append({"step": 1})
    assert file.read() == [{"step": 1}]


def test_cutting_leaves_the_bytes_that_a_checkpoint_knows(file):
    before, size = file.path.read_bytes(), file.size()
    file.append({"step": 4, "eval_loss": 1.5})
    whole = file.path.stat().st_size
    with file.path.open("ab") as raw:
        raw.write(b'{"step": 5, "lo')
    assert file.size() == whole
    file.cut_to(size)
    assert file.path.read_bytes() == before


def test_what_json_lacks_becomes_null(file):
    file.append({"step": 4, "loss": float("nan"), "grad_norm": float("inf")})
    assert file.read()[-1] == {"step": 4, "loss": None, "grad_norm": None}


def test_a_curve_is_drawn_of_what_was_logged(file, tmp_path):
    file.append({"step": 3, "eval_loss": 1.2})
    picture = draw_loss_curve(file.path, tmp_path / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty.jsonl"
    assert draw_loss_curve(empty, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_smoothing_starts_at_the_first_value_and_follows():
    assert smoothed([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    falling = smoothed([4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert falling[0] == pytest.approx(4.0)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.2
