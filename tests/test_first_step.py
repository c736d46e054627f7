"""The first optimizer step of a whole run, held against plain transformers and PEFT on the same rows, in fp32.

Plain SGD with a learning rate of 1 and no clipping moves every weight by its gradient, so two saved adapters tell it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hyperion import FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor

ROWS = [{"prompt": "q" * (3 + 5 * n), "completion": " a" * (1 + n % 4)} for n in range(8)]


def run(folder: Path, base: Path, seed: int, learning_rate: float, batch: int, accumulation: int) -> dict[str, Any]:
    config = FinetuneConfig(
        base_model=str(base),
        dtype="float32",
        adapter={"type": "lora", "r": 4, "target_modules": "all-linear", "init_lora_weights": False},
        training={
            "max_steps": 1,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "learning_rate": learning_rate,
            "lr_scheduler": "constant",
            "max_grad_norm": 0.0,
            "use_cpu": True,
            "seed": seed,
        },
    )
    train, _ = DatasetProcessor(dataset=ROWS).prepare()
    artifact = Trainer(config).train(train, output_dir=folder)
    weights = load_file(artifact.folder / "adapter_model.safetensors")
    return {"folder": artifact.folder, "weights": weights, "loss": logged_loss(artifact.folder)}


def logged_loss(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return next(line["loss"] for line in lines if "loss" in line)


def plain_step(base: Path, adapter: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean cross-entropy over all completion tokens of all rows, and its gradients, by transformers and PEFT alone."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    )
    sequences = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        first = [tokenizer.bos_token_id] if tokenizer("q")["input_ids"][:1] == [tokenizer.bos_token_id] else []
        sequences.append((first + prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.zeros(len(ROWS), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, (prompt, answer) in enumerate(sequences):
        whole = torch.tensor(prompt + answer)
        ids[index, : len(whole)], mask[index, : len(whole)] = whole, 1
        labels[index, len(prompt) : len(whole)] = whole[len(prompt) :]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), get_peft_model_state_dict(model, state_dict=gradients)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)], ids=["batch 8", "batch 2 x 4"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    seed: int, batch: int, accumulation: int, tiny_model: Path, tmp_path: Path
) -> None:
    start = run(tmp_path / "start", tiny_model, seed, 1e-30, batch, accumulation)
    moved = run(tmp_path / "moved", tiny_model, seed, 1.0, batch, accumulation)
    loss, gradients = plain_step(tiny_model, start["folder"])
    assert moved["loss"] == pytest.approx(loss, rel=1e-5)
    assert start["weights"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        found = start["weights"][name].double() - moved["weights"][name].double()
        # A weight of size w is known to w times 6e-8, which is what a small gradient is taken from here.
        noise = 1e-7 * start["weights"][name].norm()
        assert (found - gradient.double()).norm() <= 1e-5 * gradient.norm() + noise, name
