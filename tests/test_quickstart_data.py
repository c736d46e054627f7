"""The quickstart's data: what is held out was never trained on, in words or in phrasing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def message(row: dict) -> str:
    return row["messages"][-2]["content"]


def test_the_files_are_what_the_generator_writes() -> None:
    done = subprocess.run([sys.executable, QUICKSTART / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_held_out_messages_share_no_wording_with_the_training_data() -> None:
    trained = {message(row) for row in rows("train.jsonl")}
    held_out = [message(row) for row in rows("test.jsonl")]
    assert len(held_out) >= 100
    assert len(set(held_out)) == len(held_out)
    assert not trained & set(held_out)


def test_the_grader_is_strict() -> None:
    grade = module("grade").grade
    row = {"messages": [{"role": "assistant", "content": '{"intent": "refund", "order": null}'}]}
    answers = [
        '{"order": null, "intent": "refund"}',
        '{"intent": "refund"}',
        'Sure: {"intent": "refund", "order": null}',
        '{"intent": "refund", "order": "null"}',
        "",
    ]
    assert [grade([row], [answer]).exact for answer in answers] == [1.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="one answer a row"):
        grade([row], [])
