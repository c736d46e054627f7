"""What lies damaged in a cache is made again; a cache that cannot be written is named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from byte_tokenizer import sft
from hyperion_core.errors import DataError, TrainingError
from hyperion_core.testing.tiny import tiny_tokenizer

from hyperion.data import DatasetProcessor
from hyperion.data.tokenization import tokenize_rows
from hyperion.models.cache import check_caches

Damage = Callable[[Path], None]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def other(path: Path) -> None:
    """A whole file, of fewer rows."""
    rows = datasets.Dataset.from_file(str(path)).to_list()[:3]
    path.unlink()
    with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
        for row in rows:
            writer.write(row)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "".join(f"{n}?,{n}!\n" for n in range(50)))
    return path


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


@pytest.mark.parametrize("damage", [cut, empty, other])
def test_damaged_prepared_rows_are_made_again(damage: Damage, rows: Path, cache: Path) -> None:
    whole = DatasetProcessor(rows).prepare()[0].to_list()
    damage(only(cache, "generator-train.arrow"))
    assert DatasetProcessor(rows).prepare()[0].to_list() == whole


def test_prepared_rows_without_their_description_are_made_again(rows: Path, cache: Path) -> None:
    whole = DatasetProcessor(rows).prepare()[0].to_list()
    cut(only(cache, "dataset_info.json"))
    assert DatasetProcessor(rows).prepare()[0].to_list() == whole


@pytest.mark.parametrize("damage", [cut, empty, other])
def test_damaged_tokens_are_made_again(damage: Damage, rows: Path, tmp_path: Path) -> None:
    def tokens() -> list[dict[str, Any]]:
        prepared, _ = DatasetProcessor(rows).prepare()
        options = {"max_length": 100, "fingerprint_of": "sft", "cache_dir": tmp_path / "tokens"}
        return tokenize_rows(prepared, tiny_tokenizer(), sft, **options).to_list()  # type: ignore[arg-type]

    whole = tokens()
    damage(only(tmp_path / "tokens", "*.arrow"))
    assert tokens() == whole


# In a process of its own: the limit cannot be raised again.
FULL = """
import resource, signal, sys
import datasets
from hyperion.data import DatasetProcessor
from hyperion_core.errors import DataError
rows = [{"prompt": str(n) * 100, "completion": "yes"} for n in range(2000)]
with open("rows.csv", "w") as file:
    file.write("prompt,completion\\n" + "".join(f"{row['prompt']},yes\\n" for row in rows))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    DatasetProcessor("rows.csv").prepare()
except DataError as error:
    print(error)
"""
FULL_TOKENS = """
import resource, signal
from hyperion.data import DatasetProcessor
from hyperion.data.tokenization import tokenize_rows
from hyperion_core.errors import DataError
from hyperion_core.facts import Segment, Sequence
from hyperion_core.testing.tiny import tiny_tokenizer
prepared, _ = DatasetProcessor([{"prompt": str(n) * 100, "completion": "yes"} for n in range(500)]).prepare()
tokenizer = tiny_tokenizer()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
def sft(row):
    return [Sequence(segments=tuple(Segment(**segment) for segment in row["segments"]))]
try:
    tokenize_rows(prepared, tokenizer, sft, max_length=512, fingerprint_of="x", cache_dir="tokens")
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize(
    ("script", "what", "variable"),
    [(FULL, "the prepared rows of rows.csv", "HF_DATASETS_CACHE"), (FULL_TOKENS, "the tokens", "HYPERION_CACHE")],
    ids=["rows", "tokens"],
)
def test_a_full_disk_is_named(script: str, what: str, variable: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=120, check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
    )  # fmt: skip
    assert done.stdout.startswith(f"{what} cannot be written to"), done.stdout + done.stderr[-2000:]
    assert "why: File too large" in done.stdout or "File too large" in done.stdout
    assert variable in done.stdout
    assert not list(tmp_path.rglob("tokens-*.arrow"))


def test_a_home_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("HYPERION_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "file"))
    with pytest.raises(TrainingError, match="set HYPERION_CACHE") as caught:
        check_caches()
    assert "file" in str(caught.value)
    monkeypatch.setenv("HYPERION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TrainingError, match="set HF_DATASETS_CACHE"):
        check_caches()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_error_of_a_row_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": null}\n')
    with pytest.raises(DataError, match="cannot be trained on"):
        DatasetProcessor(tmp_path / "rows.jsonl").prepare()
