"""The benchmarks are run rarely, and by hand: a name of ours that has moved must not be found out then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
