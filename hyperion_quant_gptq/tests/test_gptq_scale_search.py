"""How the scale of a group is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyperion_quant_gptq import GptqConfig, GptqQuantizer, scale_search
from hyperion_quant_gptq.scale_search import grid


def errors(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    numbers = ((x / scale).round() + zero).clamp(0, 2**bits - 1)
    return (x - (numbers - zero) * scale).abs()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_as_good_as_trying_80_shares_of_the_largest_weights_scale(bits: int, sym: bool, seed: int) -> None:
    """And so as gptqmodel's search, which tries these."""
    draw = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(256, 64, generator=draw) + 0.3, torch.rand(64, generator=draw)
    largest, zero = grid(x, None, bits=bits, sym=sym, power=0)
    tried = [(errors(x, p * largest, zero, bits) ** 2.4 @ weights) for p in (1 - step / 100 for step in range(80))]
    best = torch.stack(tried).amin(0)
    found = errors(x, *grid(x, weights, bits=bits, sym=sym, power=2.4), bits) ** 2.4 @ weights
    assert found.mean() <= 1.01 * best.mean()
    assert (found <= 1.001 * tried[0]).all()


def test_a_group_of_zeros_has_a_scale() -> None:
    for sym in (True, False):
        scale, zero = grid(torch.zeros(2, 32), torch.ones(32), bits=4, sym=sym, power=2.4)
        assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero).all()


def test_errors_that_cannot_be_made_good_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out is nearer than with a search in which all columns count alike; over four seeds."""

    def lost() -> float:
        total = 0.0
        for seed in range(4):
            draw = torch.Generator().manual_seed(seed)
            weight, inputs = torch.randn(64, 64, generator=draw), torch.randn(512, 64, generator=draw)
            inputs[:, ::8] *= 8
            stats = {"second_moment": inputs.T @ inputs / len(inputs)}
            found = GptqQuantizer().quantizer_fake_quantize(weight, GptqConfig(bits=3), 3, 32, stats)
            total += (inputs @ (found - weight).T).square().sum().item()
        return total

    weighted = lost()
    monkeypatch.setattr(scale_search._Search, "begin", lambda self, factor: None)
    assert weighted < 0.9 * lost()
