"""Rounding by torchao: a weight in, integers and scales out. Loaded only with torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hyperion_core.quiet import ON_IMPORT, errors_only
from torch import Tensor, nn

from .config import TorchaoConfig

_LEAST_SCALE = 2.0**-24  # of float16


@dataclass(frozen=True)
class Rounded:
    """W = (numbers - zero) * scale, in groups along each row.

    numbers: uint8 (out, in), below 2^bits. scale: float16 (out, groups). zero: uint8 (out, groups), or None where it
    is 2^(bits - 1) throughout.
    """

    numbers: Tensor
    scale: Tensor
    zero: Tensor | None


def rounded(weight: Tensor, bits: int, group_size: int, config: TorchaoConfig) -> Rounded:
    """What `torchao.quantization.quantize_` makes of a linear module that holds `weight`, (out, in), in float32."""
    with errors_only(*ON_IMPORT):
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    weight = weight.detach().float()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    how = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.SYMMETRIC if config.sym else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(config.algorithm),
    )
    quantize_(linear, how)
    held, least = linear.weight, -(2 ** (bits - 1))
    grouped = weight.unflatten(1, (-1, group_size))
    scale, zero = held.scale, None if config.sym else held.zero_point
    numbers = held.qdata.unflatten(1, (-1, group_size))
    # torchao multiplies by 1 / scale in float16, which has no such number where the scale is small.
    lost = (1 / scale).isinf()
    if lost.any():
        scale = scale.where(~lost, scale.clamp_min(_LEAST_SCALE))
        division = grouped / scale.float().unsqueeze(-1)
        if zero is not None:
            lowest = (least - division.amin(-1).clamp_max(0).round()).clamp(least, -least - 1)
            zero = zero.where(~lost, lowest.to(zero.dtype))
            division = division + zero.unsqueeze(-1)
        again = division.round().clamp(least, -least - 1).to(numbers.dtype)
        numbers = numbers.where(~lost.unsqueeze(-1), again)
    return Rounded(_from_zero(numbers.flatten(1), least), scale, None if zero is None else _from_zero(zero, least))


def restored(numbers: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
    """The inverse, as far as there is one: float32 (out, in).

    Args:
        zero: uint8 (out, groups), or one number for all.
    """
    weight = numbers.float().unflatten(1, (scale.shape[1], -1))
    weight -= zero if isinstance(zero, int) else zero.float().unsqueeze(-1)
    weight *= scale.float().unsqueeze(-1)
    return weight.flatten(1)


def _from_zero(signed: Tensor, least: int) -> Tensor:
    """int8, `least` or more, as uint8 from 0 on."""
    return (signed.to(torch.int16) - least).to(torch.uint8)
