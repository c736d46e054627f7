"""The benchmarks are run rarely, and by hand: a name of ours that has moved must not be found out then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forking import forking_python

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_every_benchmark_imports() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    command = [sys.executable, "-c", f"import importlib\nfor name in {names}: importlib.import_module(name)"]
    found = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert names and found.returncode == 0, found.stderr


def test_what_an_arm_leaves_out_is_there() -> None:
    """Variants change the code that they measure, by names of ours: in one process, one after another."""
    code = "from training_speed_arms import VARIANTS\nfor _, change in VARIANTS.values():\n    if change: change()"
    found = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_arms_of_training_speed_train_on_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are told on a page: of a tiny model, in place of SmolLM2."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("HYPERION_CACHE", str(tmp_path / "cache"))
    import adaptive_bits_measures
    import training_speed
    from training_speed_report import page

    rows = [{"instruction": f"Add {n} and {n}.", "input": "Soon. " * n, "output": f"{n + n}"} for n in range(12)]
    monkeypatch.setattr(adaptive_bits_measures, "instructions", lambda folder: rows)
    settings = {**training_speed.SETTINGS, "rows_a_step": 4, "max_length": 128}
    about: dict[str, Any] = {"device_type": "cpu", "dtype": "float32", "settings": settings}
    task = training_speed.task_of("ragged", len(rows), tiny_model, about, tmp_path)
    monkeypatch.setattr(sys, "executable", str(forking_python(tmp_path)))
    arms = ("limit:float32", "plain:float32", "hyperion:")
    found = {f"ragged/{arm}/0": training_speed.run(arm, task, tmp_path) for arm in arms}
    plain, ours = (found[f"ragged/{arm}/0"] for arm in arms[1:])
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert len(ours["losses"]) == plain["steps"] == ours["steps"] == 3
    told = page({**about, "date": "", "device": "", "versions": {}, "measured": found}, "plot.png")
    assert told.count("| Hyperion |") == 1 and "| transformers + PEFT, float32 |" in told
