"""The numbers are torchao's own, packed without a gap and without a loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.quiet import ON_IMPORT, errors_only
from torch import Tensor, nn

from hyperion_quant_torchao import TorchaoConfig, TorchaoQuantizer
from hyperion_quant_torchao.packed_linear import packed_like
from hyperion_quant_torchao.packing import pack, unpack

BITS = (2, 3, 4, 5, 6, 7, 8)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"intx_choose_qparams_algorithm": "affine"}, {"sym": False})


def by_torchao(weight: Tensor, bits: int, group_size: int, config: TorchaoConfig) -> Tensor:
    """The dequantized weight of a linear module that torchao itself has quantized."""
    with errors_only(*ON_IMPORT):
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    options: dict[str, Any] = {} if config.sym else {"mapping_type": MappingType.ASYMMETRIC}
    if config.algorithm == "hqq_scale_only":
        options["intx_choose_qparams_algorithm"] = config.algorithm
    dtype = getattr(torch, f"int{bits}")
    quantize_(linear, IntxWeightOnlyConfig(dtype, PerGroup(group_size), scale_dtype=torch.float16, **options))
    return linear.weight.dequantize()


def packed(weight: Tensor, bits: int, group_size: int, config: TorchaoConfig) -> Any:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    module = packed_like(linear, bits, group_size, config.sym)
    module.hold(weight, config)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 50


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_weights_are_torchaos_to_the_bit(bits: int, options: dict[str, Any]) -> None:
    config = TorchaoConfig(bits=bits, **options)
    for seed, (shape, group_size) in enumerate([((24, 192), 64), ((7, 96), 32), ((16, 40), 8), ((1, 384), 128)]):
        weight = normal(*shape, seed=seed) * 10.0 ** (seed - 1) + seed / 100
        ours = packed(weight, bits, group_size, config).weight
        assert torch.equal(ours, by_torchao(weight, bits, group_size, config))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_small_weights_are_rounded_as_well_as_large_ones(bits: int, options: dict[str, Any]) -> None:
    """torchao's own integers are worthless where 1 / scale is more than float16 holds."""
    config, weight = TorchaoConfig(bits=bits, **options), normal(24, 192)
    for factor in (0.05, 0.005):  # with less, the float16 of the scale tells
        ours = packed(weight * factor, bits, 32, config).weight / factor
        at_full = packed(weight, bits, 32, config).weight
        assert (ours - weight).norm() < 1.1 * (at_full - weight).norm() + 0.005 * weight.norm()


@pytest.mark.parametrize("bits", [1, *BITS])
def test_packing_keeps_every_number_and_leaves_no_gap(bits: int) -> None:
    numbers = torch.randint(2**bits, (5, 88), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    held = pack(numbers, bits)
    assert held.numel() * 8 == numbers.numel() * bits
    assert torch.equal(unpack(held, bits), numbers)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_that_are_all_zero_or_hardly_more_stay_finite(options: dict[str, Any]) -> None:
    """Their scale is below what float16 has."""
    for value in (0.0, 1e-9, 1e-30):
        weight = torch.full((2, 64), value)
        held = packed(weight, 4, 32, TorchaoConfig(**options)).weight
        assert (held - weight).abs().max() < 1e-6


def test_no_cast_of_the_model_rounds_what_is_held() -> None:
    module = packed(normal(16, 64), 8, 32, TorchaoConfig(sym=False))
    expected = module.weight
    assert torch.equal(module.to(torch.bfloat16).half().double().weight, expected)


def test_a_module_of_two_bits_takes_two_bits_and_its_scales() -> None:
    """And nothing whole waits between forward and backward."""
    module = packed(normal(64, 256), 2, 64, TorchaoConfig())
    module.bias = None
    assert 8 * sum(tensor.nbytes for tensor in module.state_dict().values()) == 64 * 256 * (2 + 16 / 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = module(torch.randn(3, 256, requires_grad=True))
    assert y.requires_grad and not kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_type_of_its_input(dtype: torch.dtype) -> None:
    """As a linear module with that weight does, under autocast too."""
    module = packed(normal(16, 64), 3, 32, TorchaoConfig()).to(dtype)
    plain = nn.Linear(64, 16)
    plain.weight.data, plain.bias.data = module.unpacked().to(dtype), module.bias.data.clone()
    x = normal(2, 5, 64, seed=1).to(dtype)
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


def test_gpt2s_layers_are_quantized_too() -> None:
    """Its Conv1D keeps the weight the other way round."""
    from hyperion_core.facts import BitPlan
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).eval()
    ids = torch.arange(12)[None]
    quantizer, config = TorchaoQuantizer(), TorchaoConfig(bits=8)
    with torch.no_grad():
        expected = model(ids).logits
        model = quantizer.quantizer_after_load(model, config, BitPlan(8, 0), training=False)
        found = model(ids).logits
    assert len(quantizer.quantizer_modules(model)) == 4
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_table_in_the_readme_is_what_comes_out() -> None:
    """Squared error over squared weights; and the default is the best at 2 and 3 bits."""
    weight = normal(512, 1024)
    made = []
    for bits in BITS:
        errors = []
        for options in OPTIONS:
            back = TorchaoQuantizer().quantizer_fake_quantize(weight, TorchaoConfig(**options), bits, 64)
            errors.append(((back - weight).square().sum() / weight.square().sum()).item())
        made.append(errors)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| (.+) \| (.+) \| (.+) \|$", readme, re.MULTILINE)
    said = [[float(cell.split()[0]) for cell in row] for row in rows]
    assert said and torch.allclose(torch.tensor(said), torch.tensor(made), rtol=0.05), f"it should be {made}"
    assert min(made[0]) == made[0][0] and min(made[1]) == made[1][0]
