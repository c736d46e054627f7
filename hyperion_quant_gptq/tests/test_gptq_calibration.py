"""What is made of the calibration data: the order of layers and columns, and the options that weigh it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from hyperion_core.facts import BitPlan
from torch import Tensor
from transformers import AutoModelForCausalLM

from hyperion_quant_gptq import GptqConfig, GptqQuantizer

_spec = importlib.util.spec_from_file_location("gptq_numbers", Path(__file__).with_name("test_gptq_numbers.py"))
assert _spec and _spec.loader
numbers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(numbers)

#: What reads the same input, in the order in which it flows through a block.
STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def inputs_of(model: Any, name: str) -> Tensor:
    """All that flows into a module, (tokens, in)."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in numbers.rows():
            model(input_ids=row["input_ids"])
    hook.remove()
    return torch.cat(seen)


def rounded(weight: Tensor, inputs: Tensor | None, group_size: int = 32, **options: Any) -> Tensor:
    """3 bits."""
    stats = None if inputs is None else {"second_moment": inputs.T @ inputs / len(inputs)}
    return GptqQuantizer().quantizer_fake_quantize(weight, GptqConfig(bits=3, **options), 3, group_size, stats)


def distance(one: Tensor, two: Tensor) -> float:
    return ((one - two).norm() / two.norm()).item()


def test_each_layer_is_rounded_by_what_the_rounded_ones_before_it_give(tmp_path: Path) -> None:
    """Walked through by hand: what flows into a step of a model in which all steps before it are rounded."""
    loud = AutoModelForCausalLM.from_pretrained(numbers.save_base(tmp_path / "quiet", num_hidden_layers=2))
    for block in loud.model.layers:  # what blocks add to the hidden states would be lost beside the embeddings
        for linear in (block.self_attn.v_proj, block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj):
            linear.weight.data *= 10
    base, plan = tmp_path / "loud", BitPlan(3, 32)
    loud.save_pretrained(base)
    made = numbers.loaded(numbers.quantized(base, tmp_path / "made", plan), plan)
    whole, walked = (AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2))
    for index, names in enumerate(
        [f"model.layers.{block}.{name}" for name in step] for block in (0, 1) for step in STEPS
    ):
        expected, other = inputs_of(walked, names[0]), inputs_of(whole, names[0])
        for name in names:
            weight, found = whole.get_submodule(name).weight.detach(), made.get_submodule(name).weight
            assert distance(rounded(weight, expected), found) < 0.05, name  # 0 in most: a number or two fall otherwise
            assert index == 0 or distance(rounded(weight, other), found) > 0.1, f"{name}: this data tells nothing"
            walked.get_submodule(name).weight.data = found.detach()


def correlated_inputs() -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(256, 64, generator=draw) @ torch.randn(64, 64, generator=draw)


def test_the_more_damping_the_nearer_it_is_to_rounding_to_the_nearest() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(6))
    nearest, inputs = rounded(weight, None), correlated_inputs()
    changed = [(rounded(weight, inputs, damp_percent=damp, mse=0) != nearest).sum().item() for damp in (0.01, 0.1, 0.9)]
    assert changed[0] > changed[1] > changed[2] > 0


def test_the_column_with_the_largest_inputs_is_rounded_first() -> None:
    """To the nearest, that is: no other column's error is moved to it. Its group comes first, too."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    inputs = correlated_inputs()
    inputs[:, 50] *= 10
    found, nearest = rounded(weight, inputs, mse=0), rounded(weight, None)
    assert torch.equal(found[:, 50], nearest[:, 50])
    assert not any(torch.equal(found[:, other], nearest[:, other]) for other in (0, 32, 49, 51, 63))


def test_a_scale_is_searched_for_the_least_error() -> None:
    """Below that of the largest weight, which lies far off."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(8))
    weight[:, ::32] *= 2
    inputs = torch.eye(64)  # no input tells of another: what is left is the scale
    errors = [(rounded(weight, inputs, mse=mse) - weight).square().sum().item() for mse in (0, 2, 2.4)]
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.97 * errors[0], errors


def test_a_layer_without_a_negative_weight_keeps_its_upper_half(tmp_path: Path) -> None:
    """On a grid that is not mirrored it would end at 3/7."""
    whole, name = (
        AutoModelForCausalLM.from_pretrained(numbers.save_base(tmp_path / "base")),
        "layers.0.self_attn.q_proj",
    )
    weight = whole.model.get_submodule(name).weight.detach().abs_()
    whole.save_pretrained(tmp_path / "positive")
    plan = BitPlan(3, 64)
    made = numbers.loaded(numbers.quantized(tmp_path / "positive", tmp_path / "made", plan), plan)
    assert (made.model.get_submodule(name).weight.amax(1) > 0.6 * weight.amax(1)).all()
