"""Rounding to the nearest on GPTQ's grid, without looking at data. Loaded only with torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scale_search import grid


@dataclass(frozen=True)
class Rounded:
    """W[o, i] = (numbers[i, o] - zero[g, o]) * scale[g, o] where g = g_idx[i].

    numbers: uint8 (in, out), below 2^bits. scale: float16 (groups, out). zero: uint8 (groups, out). g_idx: int32 (in,).
    """

    numbers: Tensor
    scale: Tensor
    zero: Tensor
    g_idx: Tensor


def rounded(weight: Tensor, bits: int, group_size: int, sym: bool) -> Rounded:
    """weight: (out, in). Scales and zero points are those of gptqmodel's `Quantizer`: from the extremes of a group.

    It does not mirror the extremes of a group without a negative weight, and loses the upper half; not so here.
    """
    rows = weight.detach().float().unflatten(1, (-1, group_size))  # (out, groups, size)
    found = grid(rows.flatten(0, 1), None, bits=bits, sym=sym, power=0)
    scale, zero = (each.view(rows.shape[:2]).T for each in found)  # (groups, out)
    groups, steps = rows.permute(1, 2, 0), 2**bits - 1
    scale = scale.half()  # what is kept, and so what must be divided by
    held = scale.float().clamp(min=2**-24).unsqueeze(1)  # below float16's least number a scale is 0: all of it is lost
    numbers = (groups / held).round().add(zero.unsqueeze(1)).clamp(0, steps).to(torch.uint8).flatten(0, 1)
    return Rounded(numbers, scale, zero.to(torch.uint8), in_order(weight.shape[1], group_size, weight.device))


def restored(found: Rounded, *, ordered: bool) -> Tensor:
    """The inverse, as far as there is one: float16 (out, in), which is what gptqmodel's kernels multiply with.

    Args:
        ordered: the groups are stretches of the row, one after the other; where this is not known, g_idx is followed.
    """
    weight, zero, scale = found.numbers.half(), found.zero.half(), found.scale
    if ordered:
        weight = weight.unflatten(0, (scale.shape[0], -1))
        weight -= zero.unsqueeze(1)
        weight *= scale.unsqueeze(1)
        return weight.flatten(0, 1).T
    index = found.g_idx.long()
    weight -= zero[index]
    weight *= scale[index]
    return weight.T


def in_order(columns: int, group_size: int, device: torch.device) -> Tensor:
    """g_idx of groups that are stretches of the row."""
    return torch.arange(columns, device=device, dtype=torch.int32) // group_size
