"""QLoRA through the framework: it learns, resumes to the bit, and reloads with the loss that the run reported."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.testing.tiny import tiny_llama, tiny_tokenizer

from hyperion import FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor
from hyperion.models import load_tuned
from hyperion_quant_bnb import BnbQuantizer

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]
FORMS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 128, "double_quant": True},
    {"bits": 8, "skip_modules": ["o_proj"]},
]


def train(base: Path, output: Path, quantization: Any, *, resume: bool = False, **training: Any) -> Any:
    config = FinetuneConfig(
        base_model=str(base),
        adapter={"type": "lora", "r": 4, "target_modules": "all-linear"},
        quantization=quantization,
        dtype=training.pop("dtype", "float32"),
        training={
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "eval_samples": 0, **training
        },
    )  # fmt: skip
    rows, evaluation = DatasetProcessor(dataset=ROWS, validation_split=8).prepare()
    return Trainer(config).train(rows, evaluation, output_dir=output, resume=resume)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_it_resumes_to_the_bit_and_reloads_with_its_loss(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    out, quantization = tmp_path / "out", {"method": "bnb", **options}
    schedule = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "save_total_limit": 5}
    done = train(tiny_model, out, quantization, **schedule)
    whole = (out / "adapter_model.safetensors").read_bytes()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    (out / "hyperion.json").unlink()
    train(tiny_model, out, quantization, resume=True, **schedule)
    assert (out / "adapter_model.safetensors").read_bytes() == whole
    again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [[line.get("loss", line.get("eval_loss")) for line in lines] for lines in (metrics, again)]
    assert losses[0] == losses[1] and len(losses[0]) > 3

    tuned = load_tuned(out, dtype="float32")
    infos = {name: info for name, info in BnbQuantizer().quantizer_modules(tuned.model).items() if info.bits != 16}
    assert {info.bits for info in infos.values()} == {options["bits"]}
    packed = [tuned.model.get_submodule(name).weight for name in infos]
    assert {weight.dtype for weight in packed} == {torch.uint8 if options["bits"] == 4 else torch.int8}
    of_base = {name for name in dict(tuned.model.named_modules()) if name.endswith("base_layer")}
    assert len(infos) == len(of_base) - 2 * bool(options.get("skip_modules"))
    shrunk = sum(weight.nbytes for weight in packed) * 8 / options["bits"]
    layers = [tuned.model.get_submodule(name) for name in infos]
    assert shrunk == sum(each.in_features * each.out_features for each in layers)
    assert done.metrics["eval_loss"] < 5.5


@pytest.fixture(scope="module")
def counting_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learnt something: to count on from a number."""
    model, tokenizer = tiny_llama(hidden_size=64, intermediate_size=128), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [f"{n} plus 1 is {n + 1} and then comes {n + 2}" for n in range(10, 90)]
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = ids[torch.randperm(len(ids), generator=generator)[:16]]
        model.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("counting")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_after_100_steps_its_loss_is_that_of_lora_on_a_bfloat16_base(counting_base: Path, tmp_path: Path) -> None:
    """In the mean of three seeds: that of eight held-out rows scatters by as much as is asked for."""
    losses: dict[str, Counter[str]] = {"nf4": Counter(), "plain": Counter()}
    for seed in range(3):
        for name, quantization in (("nf4", {"method": "bnb"}), ("plain", None)):
            arguments = {"dtype": "bfloat16", "max_steps": 100, "eval_steps": 100, "learning_rate": 2e-3, "seed": seed}
            done = train(counting_base, tmp_path / f"{name}-{seed}", quantization, **arguments)
            losses[name].update({metric: done.metrics[metric] for metric in ("train_loss", "eval_loss")})
    for metric in ("train_loss", "eval_loss"):
        assert losses["nf4"][metric] == pytest.approx(losses["plain"][metric], rel=0.05), metric
