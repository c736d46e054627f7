"""Configs that once ended in a traceback, or were taken for something else: each was found by fuzzing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import ConfigError, TrainingError

from hyperion import FinetuneConfig
from hyperion.output import claim_output, output_folder
from hyperion.planning import make_plan


def written(folder: Path, base: Path, **changes: Any) -> FinetuneConfig:
    (folder / "rows.jsonl").write_text('{"prompt": "1 and 1", "completion": "2"}\n' * 5, encoding="utf-8")
    config = {"base_model": str(base), "adapter": {"type": "lora"}, "dataset": "rows.jsonl", **changes}
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return FinetuneConfig.from_file(path)


def refusal(folder: Path, base: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(written(folder, base, **changes), device="cpu")
    assert all(problem.why and problem.fix for problem in caught.value.problems), caught.value
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"base_model": "x" * 5000}, "File name too long"),
        ({"dataset": "x" * 5000}, "File name too long"),
        ({"dataset": "~nobody-of-that-name/rows.jsonl"}, "nobody-of-that-name"),
        ({"base_model": "package://json.nothing/x"}, "base_model"),
        ({"training": {"max_steps": 10**380, "warmup_ratio": 0.1}}, "it must be 2147483647 or less"),
        ({"training": {"num_train_epochs": 1e308}}, "it must be 1000000"),
        ({"training": {"max_steps": 10, "warmup_steps": 10}}, "the learning rate would never get to its peak"),
        ({"output_dir": ""}, "output_dir"),
    ],
)
def test_a_value_beyond_all_bounds_is_refused(changes: dict[str, Any], says: str, tmp_path: Path, tiny_model: Path):
    assert says in refusal(tmp_path, tiny_model, **changes)


@pytest.mark.parametrize("folder", ["a\0b", "~nobody-of-that-name/out", "x" * 5000, "/dev/null/out"])
def test_an_output_folder_that_cannot_be_one(folder: str) -> None:
    with pytest.raises(TrainingError) as caught, output_folder(Path(folder), resume=False):
        raise AssertionError("it was made")
    assert caught.value.why and caught.value.fix


def test_no_without_quotes_is_the_word_that_eval_strategy_takes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base_model: o/m\nadapter: {type: lora}\ntraining: {eval_strategy: no, save_strategy: no}\n")
    assert FinetuneConfig.from_file(path).training.eval_strategy == "no"


def test_a_run_that_fails_before_it_trains_leaves_no_folder(tmp_path: Path, tiny_model: Path) -> None:
    plan = make_plan(written(tmp_path, tiny_model), device="cpu").plan
    out = tmp_path / "above/out"

    def fail(*, trained: bool) -> None:
        with output_folder(out, resume=False) as (folder, _):
            claim_output(folder, plan, None)
            if trained:
                (folder / "metrics.jsonl").write_text("{}\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(trained=False)
    assert not out.parent.exists()
    with pytest.raises(RuntimeError):
        fail(trained=True)
    assert {path.name for path in out.iterdir()} == {"plan.json", "metrics.jsonl"}
