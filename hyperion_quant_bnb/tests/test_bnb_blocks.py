"""What blocks are, said again by hand: 4-bit indices, two a byte, times the scale of their block of the flat weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperion_quant_bnb import BnbConfig, BnbQuantizer
from hyperion_quant_bnb.linear import bnb, dequantized, exact, requantized


def by_hand(module: Any) -> torch.Tensor:
    state = module.weight.quant_state
    scales = state.absmax
    if state.nested:
        above = state.state2.absmax.repeat_interleave(256)[: scales.numel()]
        scales = state.state2.code[scales.long()] * above + state.offset
    packed = module.weight.data.flatten()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()]
    return (state.code[indices.long()] * scales.repeat_interleave(state.blocksize)[: len(indices)]).view(state.shape)


@pytest.mark.parametrize("block", [32, 64, 128, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(256, 576), (30, 100), (5, 6)])
def test_blocks_run_over_the_flat_weight_whatever_its_rows(block: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for kind, nested in (("nf4", True), ("fp4", False)):
        start = exact(bnb.nn.Linear4bit(shape[1], shape[0], bias=False), torch.float32)
        module = requantized(start, weight, 4, block, kind, nested)
        expected = by_hand(module)
        assert torch.equal(dequantized(module), expected)
        with torch.no_grad():
            assert torch.equal(module(torch.eye(shape[1])).T, expected)
        blocks = weight.flatten().split(block)
        near = [0.2 * float(each.abs().max()) for each in blocks]
        off = (expected - weight).abs().flatten().split(block)
        assert all(float(each.max()) <= bound for each, bound in zip(off, near, strict=True))


def test_larger_blocks_are_less_exact() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [
        float((BnbQuantizer().quantizer_fake_quantize(weight, BnbConfig(), 4, block) - weight).norm())
        for block in (32, 64, 256, 4096)
    ]
    assert errors == sorted(errors)
