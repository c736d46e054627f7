"""Scales that learn from the unquantized model: exact gradients, a nearer model of the same size, never a worse one."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import DataError
from hyperion_core.facts import BitPlan
from hyperion_core.live_facts import live_model_facts
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hyperion_quant_gptq import GptqQuantizer, distillation
from hyperion_quant_gptq.packed_linear import PackedLinear
from hyperion_quant_gptq.rounding import Rounded, rounded

_spec = importlib.util.spec_from_file_location("gptq_numbers", Path(__file__).with_name("test_gptq_numbers.py"))
assert _spec and _spec.loader
numbers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(numbers)

PLAN = BitPlan(2, 32)


def divergence(folder: Path, base: Path, **options: Any) -> float:
    """On other tokens than those of `numbers.rows()`."""
    ids = torch.randint(0, 250, (64, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits.log_softmax(-1)
        found = numbers.loaded(folder, PLAN, **options)(ids).logits.log_softmax(-1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True).item() / ids.numel()


def packed(bits: int, sym: bool, ordered: bool, seed: int) -> PackedLinear:
    draw = torch.Generator().manual_seed(seed)
    found = rounded(torch.randn(32, 64, generator=draw), bits, 16, sym)
    if not ordered:  # columns of different groups side by side, as desc_act leaves them
        order = torch.randperm(64, generator=draw)
        found = Rounded(found.numbers[order], found.scale, found.zero, found.g_idx[order])
    linear = PackedLinear((32, 64), None, bits, 16, sym=sym, version=1)
    linear.hold(found)
    return linear


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("sym", "ordered"), [(True, True), (False, False)])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_gradient_is_that_of_the_dense_weight(bits: int, sym: bool, ordered: bool, seed: int) -> None:
    linear = packed(bits, sym, ordered, seed)
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    up = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(seed + 9))
    with distillation._learning(linear) as (weight,):
        torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-3, atol=1e-2)  # whose weight is float16
        (linear(x) * up).sum().backward()
        by_hand, change = x.grad, weight.change.grad
    dense = x.detach().clone().requires_grad_()
    scale = linear.scales.float().clone().requires_grad_()
    zeros, grid = numbers.unpack_zeros(linear.qzeros, bits, 1), numbers.unpack(linear.qweight, bits)
    index = linear.g_idx.long()
    whole = (grid.float() - zeros[index]) * scale[index]
    ((dense @ whole) * up).sum().backward()
    torch.testing.assert_close(by_hand, dense.grad)
    assert scale.grad is not None
    torch.testing.assert_close(change, (scale.grad * linear.scales.float()).T, rtol=1e-4, atol=1e-4)


# The third with the scales of the largest weights: those that are searched for leave it nothing to learn here.
@pytest.mark.parametrize("options", [{}, {"embedding_bits": 4}, {"sym": False, "desc_act": True, "mse": 0}], ids=str)
def test_it_is_nearer_in_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=True)
    plain = numbers.quantized(base, tmp_path / "plain", PLAN, **options)
    learnt = numbers.quantized(base, tmp_path / "learnt", PLAN, distill_steps=60, **options)
    before, after = (divergence(folder, base, **options) for folder in (plain, learnt))
    assert after < 0.85 * before, (before, after)
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, learnt))
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved and all(name.endswith(("scales", ".scale")) for name in moved)
    assert all(one[name].shape == two[name].shape and one[name].dtype == two[name].dtype for name in one)


def test_what_is_no_better_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = numbers.save_base(tmp_path / "base")
    plain = numbers.quantized(base, tmp_path / "plain", PLAN)
    monkeypatch.setattr(distillation, "_RATE", 50.0)
    with caplog.at_level(logging.WARNING, logger="hyperion"):
        learnt = numbers.quantized(base, tmp_path / "learnt", PLAN, distill_steps=3)
    assert "dropped" in caplog.text
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, learnt))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_checkpoint_says_so_and_is_recognized(tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base")
    folder = numbers.quantized(base, tmp_path / "made", PLAN, distill_steps=2)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    facts = live_model_facts(AutoModelForCausalLM.from_pretrained(base))
    options, _ = GptqQuantizer().quantizer_recognize(saved, facts)
    assert options["distill_steps"] == 2
    del saved["meta"]["distill_steps"]  # of a checkpoint that another tool wrote
    assert GptqQuantizer().quantizer_recognize(saved, facts)[0]["distill_steps"] == 0


def test_one_sequence_is_too_little(tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base")
    only: list[dict[str, Tensor]] = numbers.rows(count=1)
    with pytest.raises(DataError, match="distill_steps has too little"):
        numbers.quantized(base, tmp_path / "made", PLAN, only, distill_steps=2)
