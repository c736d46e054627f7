"""What a run may not do in silence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from hyperion import FinetuneConfig, HyperionError, Trainer
from hyperion.data import DatasetProcessor

ROWS = [{"prompt": f"{n} is", "completion": f" {n}"} for n in range(12)]


def config(base: Path, **training: Any) -> FinetuneConfig:
    return FinetuneConfig(
        base_model=str(base),
        dtype="float32",
        adapter={"type": "lora", "r": 2, "target_modules": ["q_proj"]},
        training={"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1, **training},
    )


def prepared(rows: list[dict[str, str]] = ROWS) -> Any:
    return DatasetProcessor(dataset=rows).prepare()[0]


def test_line_separators_of_unicode_in_a_sample_do_no_harm(tiny_model: Path, tmp_path: Path) -> None:
    odd = [{"prompt": "a\u2028b\u2029c\x85d", "completion": " e\u2028f"}]
    artifact = Trainer(config(tiny_model, eval_samples=1)).train(prepared(), prepared(odd), output_dir=tmp_path / "out")
    assert "## Samples" in (artifact.folder / "README.md").read_text(encoding="utf-8")


def test_evaluation_data_alone_is_used_beside_the_configs_training_data(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    whole = config(tiny_model).replace(dataset=str(tmp_path / "rows.jsonl"))
    artifact = Trainer(whole).train(eval_dataset=prepared(ROWS[:3]), output_dir=tmp_path / "out")
    assert artifact.metrics["eval_loss"] > 0


def test_other_data_is_not_resumed(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainer = Trainer(config(tiny_model, max_steps=4, save_steps=2))
    trainer.train(prepared(), output_dir=out)
    (out / "hyperion.json").unlink()
    with pytest.raises(HyperionError, match="the training data is not what the run in"):
        trainer.train(prepared(list(reversed(ROWS))), output_dir=out, resume=True)


def test_where_activations_wait_may_change_when_a_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """`recompute_layers: auto` depends on the memory that is free at the moment: the bytes do not."""
    out = tmp_path / "out"
    Trainer(config(tiny_model, max_steps=4, save_steps=2)).train(prepared(), output_dir=out)
    whole = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-4")
    (out / "hyperion.json").unlink()
    Trainer(config(tiny_model, max_steps=4, save_steps=2, recompute_layers=1)).train(
        prepared(), output_dir=out, resume=True
    )
    assert (out / "adapter_model.safetensors").read_bytes() == whole


OBJECTIVE = """
from hyperion_core.facts import Segment, Sequence
from hyperion_core.kinds import Objective

class Mine(Objective):
    def objective_sequences(self, row):
        text = "".join(segment["text"] for segment in row["segments"])
        return [Sequence((Segment(text, True),))]

    def objective_loss(self, logps, normalizer):
        return -logps.sum() / normalizer, {}
"""


def test_a_changed_objective_is_not_served_from_the_token_cache(
    tiny_model: Path, tmp_path: Path, fake_dist, cli
) -> None:
    folder = fake_dist("mine", {"hyperion.objectives": {"mine": "my_objective:Mine"}}, {"my_objective": OBJECTIVE})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    whole = config(tiny_model).replace(dataset="rows.jsonl", objective="mine").as_data()
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    learnt = []
    for name in ("before", "after"):
        done = cli("train", "config.json", "--output_dir", name)
        assert done.code == 0, done.stderr
        manifest = json.loads((tmp_path / name / "hyperion.json").read_text(encoding="utf-8"))
        learnt.append(manifest["data"]["tokenized"]["supervised"])
        shorter = OBJECTIVE.replace("Segment(text, True)", "Segment(text[2:], True)")
        (folder / "my_objective.py").write_text(shorter, encoding="utf-8")
    assert learnt[1] < learnt[0]


def test_autocast_to_bfloat16_works_where_there_is_no_gpu(tiny_model: Path, tmp_path: Path) -> None:
    whole = config(tiny_model, bf16=True)
    found = FinetuneConfig(**{**whole.given(), "training": {**whole.training.given(), "use_cpu": False}})
    assert Trainer(found).train(prepared(), output_dir=tmp_path / "out").metrics["train_loss"] > 0


def test_cut_rows_are_told(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [{"prompt": "q", "completion": " a" * 40}] * 4
    with caplog.at_level(logging.INFO, logger="hyperion"):
        allowing = config(tiny_model, max_length=16).replace(audit={"allow": ["truncation"]})
        Trainer(allowing).train(prepared(long), output_dir=tmp_path / "out")
    assert "4 of 4 rows were cut at max_length" in caplog.text


def test_a_run_that_failed_early_leaves_its_folder_free(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": None}), encoding="utf-8")
    trainer = Trainer(config(tiny_model).replace(dataset=str(tmp_path / "rows.jsonl")))
    with pytest.raises(HyperionError):
        trainer.train(output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert trainer.train(output_dir=tmp_path / "out").metrics["train_loss"] > 0


def test_nothing_published_holds_a_path_of_this_machine(tiny_model: Path, tmp_path: Path) -> None:
    from hyperion.models import load_tuned

    artifact = Trainer(config(tiny_model)).train(prepared(), output_dir=tmp_path / "out")
    assert artifact.adapter["base_model"].startswith("..")
    for name in ("README.md", "adapter_config.json", "adapter.json", "hyperion.json"):
        assert str(tiny_model) not in (artifact.folder / name).read_text(encoding="utf-8"), name
    assert load_tuned(tmp_path / "out").model is not None
