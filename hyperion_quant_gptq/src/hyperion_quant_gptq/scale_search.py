"""The scale and zero point of each group, by what their rounding costs. Loaded only with torch.

gptqmodel's own search tries 80 shares of the largest weight's scale, counts the error of each column alike, and goes
through the whole matrix once more than it uses. Here it is coarse first and fine around the best, and an error counts
as much as GPTQ's own loss says: (w - q)² / d² of a column, d from the Cholesky factor of the inverse Hessian (Frantar
et al. 2022, arXiv:2210.17323, eq. 4). Weighted so, the grid fits the columns whose errors cannot be made good.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

_COARSE = tuple(1 - step / 20 for step in range(-3, 16))  # 1.15 to 0.25, of the largest weight's scale
_FINE = tuple(step / 100 for step in (-4, -3, -2, -1, 1, 2, 3, 4))  # around the best of these


def search_scales(task: Any, group_size: int) -> None:
    """Have gptqmodel's `GPTQ` task ask here for the scales of its groups, columns in the order of its rounding."""
    inverse, search = task.hessian_inverse, _Search(task.qcfg, group_size)

    def seen(hessian: Tensor) -> tuple[Tensor | None, float]:
        factor, damp = inverse(hessian)
        search.begin(factor)
        return factor, damp

    task.hessian_inverse = seen
    # Bound, and no subclass: gptqmodel's kernel for CUDA works with the very class `Quantizer` alone.
    task.quantizer.find_params = MethodType(search, task.quantizer)


class _Search:
    def __init__(self, options: Any, group_size: int) -> None:
        self.bits, self.sym, self.power, self.group_size = options.bits, options.sym, options.mse, group_size
        self.weights: Iterator[Tensor] | None = None

    def begin(self, factor: Tensor | None) -> None:
        """The inverse Hessian's factor, (in, in), is known: the groups are asked for, one after the other."""
        self.weights = None if factor is None else iter(factor.diagonal().float().pow(-2).split(self.group_size))

    def __call__(self, quantizer: Any, x: Tensor, weight: bool = False) -> None:
        """`Quantizer.find_params`, x (out, in)."""
        power = self.power
        if x.shape[1] > self.group_size:  # of the whole matrix: gptqmodel asks, and throws it away
            x, power = x[:, : self.group_size], 0.0
        weights = None if self.weights is None or not power else next(self.weights)
        scale, zero = grid(x, weights, bits=self.bits, sym=self.sym, power=power)
        quantizer.maxq = quantizer.maxq.to(x.device)
        quantizer.scale, quantizer.zero = scale, zero


def grid(x: Tensor, weights: Tensor | None, *, bits: int, sym: bool, power: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of a group x, (out, size); both (out, 1), float32.

    Args:
        weights: how much a column's errors count, (size,); None: all alike.
        power: the least sum of |error| to this power is found. 0: the scale is that of the largest weight.
    """
    steps = 2**bits - 1
    x = x.float()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    scale = torch.where(empty, 2 / steps, (high - low) / steps)
    if sym:
        zeros = [torch.full_like(scale, (steps + 1) / 2)]
    else:
        ideal = torch.where(empty, 0, -low / scale)
        zeros = [ideal.round()] if not power else [ideal.floor(), ideal.ceil()]
    if not power:
        return scale, zeros[0]
    wanted, weights = x / scale, x.new_ones(x.shape[1]) if weights is None else weights
    best = torch.full_like(scale, torch.inf)
    share, zero = torch.ones_like(scale), zeros[0].clone()

    def try_out(shares: Tensor, candidate: Tensor) -> None:
        numbers = wanted / shares
        error = numbers.round().clamp_(-candidate, steps - candidate).sub_(numbers).abs_().pow_(power)
        cost = (error @ weights).unsqueeze(1) * shares.pow(power)
        better = cost < best
        torch.where(better, cost, best, out=best)
        torch.where(better, shares, share, out=share)
        torch.where(better, candidate, zero, out=zero)

    for candidate in zeros:
        for each in _COARSE:
            try_out(torch.full_like(scale, each), candidate)
    around, candidate = share.clone(), zero.clone()
    for step in _FINE:
        try_out(around + step, candidate)
    return scale * share, zero
