"""Rounding by torchao: a weight in, integers and scales out. Loaded only with torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hyperion_core.quiet import ON_IMPORT, errors_only
from torch import Tensor, nn

from .config import TorchaoConfig


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

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    how = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.SYMMETRIC if config.sym else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(config.algorithm),
    )
    quantize_(linear, how)
    held, least = linear.weight, -(2 ** (bits - 1))
    # A scale below float16's least number is 0, and what was divided by it is no number.
    numbers = held.qdata.unflatten(1, (-1, group_size)).masked_fill((held.scale == 0).unsqueeze(-1), 0).flatten(1)
    zero = None if config.sym else _from_zero(held.zero_point, least)
    return Rounded(_from_zero(numbers, least), held.scale, zero)


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
