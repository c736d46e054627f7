"""What a run leaves behind is the model that it measured: reloaded, it has the same loss by a plain reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperion import Artifact, FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor
from hyperion.data.encoding import Encoder
from hyperion.models import load_tuned

ROWS = [{"prompt": f"<ask> {n} plus {n}?", "completion": f" <tell> {n + n}"} for n in range(24)]


def trained(folder: Path, base: Path, **changes: Any) -> tuple[Artifact, Any]:
    config = FinetuneConfig(
        **{
            "base_model": str(base),
            "dtype": "float32",
            "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
            "training": {
                "num_train_epochs": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "use_cpu": True,
                "eval_samples": 0,
            },
            **changes,
        }
    )
    train, evaluation = DatasetProcessor(dataset=ROWS, validation_split=6).prepare()
    return Trainer(config).train(train, evaluation, output_dir=folder), evaluation


def plain_loss(model: Any, tokenizer: Any, rows: Any) -> float:
    """Mean cross-entropy over the completions, from the model's own full logits, one row at a time."""
    encoder, total, count = Encoder(tokenizer), 0.0, 0
    for row in rows:
        prompt, completion = (segment["text"] for segment in row["segments"])
        first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if encoder.bos_id is not None:
            first = [encoder.bos_id, *first]
        answer = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*first, *answer]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(first) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="lora"),
        pytest.param({"adapter": {"type": "ia3"}}, id="ia3"),
        pytest.param({"adapter": {"type": "lora", "use_dora": True}}, id="dora"),
        pytest.param({"new_tokens": ["<ask>", "<tell>"]}, id="lora with new tokens"),
    ],
)
def test_reloaded_it_has_the_loss_that_the_run_reported(changes: dict, tiny_model: Path, tmp_path: Path) -> None:
    artifact, evaluation = trained(tmp_path / "out", tiny_model, **changes)
    tuned = load_tuned(tmp_path / "out", dtype="float32")
    for token in changes.get("new_tokens", []):
        assert len(tuned.tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    assert plain_loss(tuned.model, tuned.tokenizer, evaluation) == pytest.approx(
        artifact.metrics["eval_loss"], rel=1e-4
    )
    tuned.use_adapter(False)
    assert plain_loss(tuned.model, tuned.tokenizer, evaluation) > artifact.metrics["eval_loss"] + 1e-3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_may_read_what_the_umask_lets_them_read(tiny_model: Path, tmp_path: Path) -> None:
    artifact, _ = trained(tmp_path / "out", tiny_model, training={"max_steps": 1, "use_cpu": True})
    modes = {path.stat().st_mode for path in artifact.folder.iterdir() if path.is_file()}
    assert len(modes) == 1


def test_new_tokens_are_refused_where_the_adapter_cannot_train_them(tiny_model: Path, tmp_path: Path) -> None:
    from hyperion import HyperionError

    with pytest.raises(HyperionError, match='the adapter "ia3" cannot train new tokens'):
        trained(tmp_path / "out", tiny_model, adapter={"type": "ia3"}, new_tokens=["<ask>"])
    assert not (tmp_path / "out").exists()


def test_a_second_call_trains_on_the_first_ones_data(tiny_model: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(
        base_model=str(tiny_model),
        adapter="lora",
        dtype="float32",
        training={"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
    )
    train, _ = DatasetProcessor(dataset=ROWS).prepare()
    trainer = Trainer(config)
    first = trainer.train(train, output_dir=tmp_path / "one")
    second = trainer.train(output_dir=tmp_path / "two")
    name = "adapter_model.safetensors"
    assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
