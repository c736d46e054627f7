"""The numbers: unpacked independently, rounded better than to the nearest, and held against every cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hyperion_core.context import RunContext
from hyperion_core.facts import BitPlan
from hyperion_core.plan import Plan
from hyperion_core.testing.tiny import tiny_llama, tiny_tokenizer
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hyperion_quant_gptq import GptqConfig, GptqQuantizer
from hyperion_quant_gptq.packed_linear import PackedLinear
from hyperion_quant_gptq.packing import pack, pack_zeros, unpack, unpack_zeros
from hyperion_quant_gptq.rounding import rounded

BITS = (2, 3, 4, 8)


def context(folder: Path) -> RunContext:
    plan = Plan(config={}, choices=(), device="cpu", dtype="float32")
    return RunContext(plan=plan, seed=0, device="cpu", output=folder, cache=folder)


def rows(count: int = 16, length: int = 32) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 250, (count, 1, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def save_base(folder: Path, **overrides: Any) -> Path:
    """A tiny model whose layers see inputs that hang together, as those of a trained one do."""
    model = tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, **overrides})
    draw = torch.Generator().manual_seed(3)
    shape = model.model.embed_tokens.weight.shape
    few = torch.randn(shape[0], 8, generator=draw) @ torch.randn(8, shape[1], generator=draw)
    model.model.embed_tokens.weight.data = few + 0.1 * torch.randn(shape, generator=draw)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantized(base: Path, folder: Path, plan: BitPlan, data: Any = None, **options: Any) -> Path:
    folder.mkdir()
    config = GptqConfig(bits=plan.bits, **options)
    made = GptqQuantizer().quantizer_prepare(base, config, plan, data or rows(), folder, context(folder))
    assert made == folder
    return folder


def loaded(folder: Path, plan: BitPlan, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **GptqQuantizer().quantizer_load_kwargs(folder))
    return (
        GptqQuantizer().quantizer_after_load(model, GptqConfig(bits=plan.bits, **options), plan, training=True).eval()
    )


def by_hand(tensors: dict[str, Any], name: str, bits: int) -> Any:
    """(out, in), from the packed tensors of a file: written from the description of the format alone."""

    def numbers(words: Any) -> Any:  # (lines, words) to (lines, numbers)
        stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))

    q = numbers(tensors[f"{name}.qweight"].T)
    zeros = (numbers(tensors[f"{name}.qzeros"]) + 1) % 2**bits  # version 1 holds them less one
    g_idx, scales = tensors[f"{name}.g_idx"], tensors[f"{name}.scales"]
    assert scales.dtype == np.float16
    return ((q - zeros[g_idx].T).astype(np.float16) * scales[g_idx].T).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"sym": False, "desc_act": True}], ids=["default", "zeros and order"])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_what_the_file_says(bits: int, options: dict[str, Any], tmp_path: Path) -> None:
    plan = BitPlan(bits, 32)
    folder = quantized(save_base(tmp_path / "base"), tmp_path / "made", plan, **options)
    model, tensors = loaded(folder, plan, **options), load_file(folder / "model.safetensors")
    ordered = []
    for name in GptqQuantizer().quantizer_modules(model):
        module = model.get_submodule(name)
        weight = GptqQuantizer().quantizer_dequantize(module)
        assert np.array_equal(weight.numpy(), by_hand(tensors, name, bits)), name
        assert torch.equal(module(torch.eye(module.in_features)).T, weight), name
        ordered.append(bool(np.array_equal(np.sort(tensors[f"{name}.g_idx"]), tensors[f"{name}.g_idx"])))
    assert all(ordered) != options.get("desc_act", False)


@pytest.mark.parametrize("bits", [3, 4])
def test_it_beats_rounding_to_the_nearest_on_what_it_was_shown(bits: int, tmp_path: Path) -> None:
    """||XWᵀ - XQᵀ|| in the first layers, whose inputs no rounding has touched; 0.6 and less of it was seen."""
    plan, base = BitPlan(bits, 32), save_base(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(base)
    model = loaded(quantized(base, tmp_path / "made", plan), plan)
    seen: list[Tensor] = []
    first = "model.layers.0.self_attn.q_proj"
    whole.get_submodule(first).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows():
            whole(input_ids=row["input_ids"])
    inputs = torch.cat(seen)
    stats = {"second_moment": inputs.T @ inputs / len(inputs)}
    for short in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{short}"
        weight = whole.get_submodule(name).weight.detach()
        nearest = GptqQuantizer().quantizer_fake_quantize(weight, GptqConfig(bits=bits), bits, 32, None)
        ours, rtn = ((inputs @ (weight - each).T).norm().item() for each in (model.get_submodule(name).weight, nearest))
        assert ours < 0.6 * rtn, f"{name}: {ours:.3g} and {rtn:.3g}"
        foreseen = GptqQuantizer().quantizer_fake_quantize(weight, GptqConfig(bits=bits), bits, 32, stats)
        # a scale between two numbers of float16 falls to either, by the order in which the moments were summed
        torch.testing.assert_close(foreseen, model.get_submodule(name).weight, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_grid_is_gptqmodels(bits: int, sym: bool) -> None:
    """Scales and zero points of the extremes of a group."""
    import logging

    from hyperion_quant_gptq.gptqmodel_import import gptq_classes

    _, options = gptq_classes(logging.getLogger("test"))
    from gptqmodel.quantization.quantizer import Quantizer

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits)) / 30
    found = rounded(weight, bits, 16, sym)
    for group in range(4):
        theirs = Quantizer(options(bits=bits, group_size=16, sym=sym, offload_to_disk=False))
        theirs.configure(perchannel=True)
        theirs.find_params(weight[:, group * 16 : group * 16 + 16], weight=True)
        assert torch.equal(found.scale[group], theirs.scale.flatten().half())
        assert torch.equal(found.zero[group], theirs.zero.flatten().to(torch.uint8))


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("shown", [False, True], ids=["to the nearest", "by inputs"])
def test_a_group_without_a_negative_weight_is_rounded_as_well_as_any(shown: bool, desc_act: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.rand(256, 64, generator=draw)
    stats = {"second_moment": torch.eye(64)} if shown else None  # no input says anything of another

    def lost(weight: Tensor) -> float:
        back = GptqQuantizer().quantizer_fake_quantize(weight, GptqConfig(desc_act=desc_act), 4, 32, stats)
        return (back - weight).square().mean().item()

    assert lost(weight) < 1.1 * lost(weight * torch.randn(weight.shape, generator=draw).sign())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_every_number(bits: int, version: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    numbers = torch.randint(2**bits, (96, 7), dtype=torch.uint8, generator=draw)
    assert torch.equal(unpack(pack(numbers, bits), bits), numbers)
    zeros = torch.randint(2**bits, (5, 64), dtype=torch.uint8, generator=draw)  # 0 too, less one in version 1
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits, version), bits, version), zeros)


def test_no_cast_of_the_model_rounds_what_is_held() -> None:
    module = PackedLinear((32, 64), None, 4, 32, sym=True, version=1)
    module.hold(rounded(torch.randn(32, 64), 4, 32, sym=True))
    expected = module.weight
    assert torch.equal(module.to(torch.bfloat16).double().float().weight, expected)
    assert module.scales.dtype == torch.float16


def test_nothing_whole_waits_between_forward_and_backward() -> None:
    module = PackedLinear((32, 64), None, 4, 32, sym=True, version=1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = module(torch.randn(3, 64, requires_grad=True))
    assert y.requires_grad and not kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_type_of_its_input(dtype: torch.dtype) -> None:
    """As a linear module with that weight does, under autocast too."""
    torch.manual_seed(0)
    module = PackedLinear((32, 64), nn.Parameter(torch.randn(32)), 3, 32, sym=True, version=1)
    module.hold(rounded(torch.randn(32, 64), 3, 32, sym=True))
    module = module.to(dtype)
    plain = nn.Linear(64, 32).to(dtype)
    plain.weight.data, plain.bias.data = module.weight.to(dtype), module.bias.data.clone()
    x = torch.randn(2, 5, 64).to(dtype)
    for autocast in (False, True):
        found = []
        for each in (module, plain):
            given = x.clone().requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = each(given)
            y.sum().backward()
            found.append((y, given.grad))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            # In bfloat16 the order of a processor's sums shows, and where it rounds before it adds the bias.
            coarse = autocast or dtype == torch.bfloat16
            near = 2**-6 if coarse else 1e-6
            torch.testing.assert_close(ours, theirs, rtol=0, atol=near * float(theirs.abs().max()))
