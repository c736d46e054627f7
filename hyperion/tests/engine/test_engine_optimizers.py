"""Optimizers of bitsandbytes by transformers' names: 8-bit state is 8-bit, and a resumed run goes on to the bit."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from hyperion_core.errors import ConfigError

from hyperion import FinetuneConfig

pytest.importorskip("bitsandbytes")
LARGE = 128  # times 32 inputs is 4096 values; bitsandbytes keeps the state of smaller tensors in 32 bits


def tensors(value):
    if isinstance(value, dict):
        return {key: found for each, part in value.items() for key, found in ({each: part} | tensors(part)).items()}
    return {}


@pytest.mark.parametrize(
    "optim, state",
    [
        ("adamw_8bit", torch.uint8),
        ("adamw_bnb_8bit", torch.uint8),
        ("paged_adamw_8bit", torch.uint8),
        ("paged_adamw_32bit", torch.float32),
        ("lion_8bit", torch.uint8),
        ("paged_lion_32bit", torch.float32),
        ("ademamix_8bit", torch.uint8),
        ("rmsprop_bnb_8bit", torch.uint8),
    ],
)
def test_a_resumed_run_goes_on_to_the_bit(tiny, tmp_path, caplog, optim, state):
    def run():
        config = tiny.LowRankConfig(rank=LARGE, dropout=0.1, lr_ratio=2.0)
        return tiny.Run(tmp_path, config=config, optim=optim, max_steps=8, learning_rate=1e-3, weight_decay=0.05)

    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.filterwarnings("error", message=".*[Pp]aged")
        whole = run()
        expected = whole.fit()
    assert (f"{optim}: nothing is paged on cpu" in caplog.text) == optim.startswith("paged")
    saved = torch.load(tmp_path / "checkpoint-4/optimizer.pt", weights_only=True)["state"]
    kinds = {part["state1"].dtype for part in map(tensors, saved.values())}
    assert kinds == {state} and len(saved) == 8

    torch.manual_seed(777)  # a new process has other random numbers
    again = run()
    result = again.fit(resume=tmp_path / "checkpoint-4")
    before, after = whole.trained(expected.model), again.trained(result.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert result.metrics["train_loss"] == expected.metrics["train_loss"]


def test_without_bitsandbytes_the_plan_says_what_to_install(monkeypatch):
    import importlib.util

    FinetuneConfig(base_model="owner/model", adapter="lora", training={"optim": "paged_adamw_8bit"})
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(base_model="owner/model", adapter="lora", training={"optim": "paged_adamw_8bit"})
    assert caught.value.exit_code == 2
    assert 'python -m pip install "hyperion-ft[bnb]"' in str(caught.value)
