"""A linear module whose weight takes the bits that it is said to take. Loaded only with torch.

torchao's own tensor for these integers, `IntxUnpackedToInt8Tensor`, keeps each in a byte, whatever its bits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from hyperion_core.unpacked_weight import unpacked_weight
from torch import Tensor, nn

from .config import TorchaoConfig
from .packing import pack, packed_width, unpack
from .rounding import restored, rounded


class PackedLinear(nn.Linear):  # PEFT and others ask for nn.Linear
    """y = x Wᵀ + b, where W is in packed integers.

    Buffers: `packed` uint8 (out, in * bits / 8); `scale` float16 (out, groups), kept as int16, so that nothing that
    casts a model to another type can round it; `zero` uint8 (out, groups), None with `sym`.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, shape: tuple[int, int], bias: nn.Parameter | None, bits: int, group_size: int, sym: bool
    ) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight in full precision
        self.out_features, self.in_features = shape
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.bias = cast(nn.Parameter, bias)
        rows, groups = self.out_features, self.in_features // group_size
        width = packed_width(self.in_features, bits)
        self.register_buffer("packed", torch.empty(rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(rows, groups, dtype=torch.int16))
        self.register_buffer("zero", None if sym else torch.empty(rows, groups, dtype=torch.uint8))

    def hold(self, weight: Tensor, config: TorchaoConfig) -> None:
        """Quantize `weight`, (out, in), into this module."""
        found = rounded(weight, self.bits, self.group_size, config)
        self.packed = pack(found.numbers, self.bits)
        self.scale = found.scale.view(torch.int16)
        self.zero = found.zero

    @property
    def weight(self) -> Tensor:
        """`unpacked()`, for others that ask a linear module for its weight."""
        return unpacked_weight(self.unpacked())

    def unpacked(self) -> Tensor:
        """What forward uses, float32 (out, in); made anew each time."""
        zero = 2 ** (self.bits - 1) if self.zero is None else self.zero
        return restored(unpack(self.packed, self.bits), self.scale.view(torch.float16), zero)

    def forward(self, input: Tensor) -> Tensor:
        y = cast(Tensor, _Product.apply(input, self))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, sym={self.sym}"


class _Product(torch.autograd.Function):
    """x · Wᵀ. Autograd alone would keep every W whole until the way back; here it is unpacked again instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return x @ module.unpacked().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.module.unpacked().to(gradient.dtype), None


def packed_like(linear: Any, bits: int, group_size: int, sym: bool) -> PackedLinear:
    """A quantized module of the same sizes on the same device, with the same bias, that holds nothing yet."""
    module = linear if isinstance(linear, PackedLinear) else linear.weight
    device = module.packed.device if isinstance(module, PackedLinear) else module.device
    with device:
        return PackedLinear(linear_shape(linear), linear.bias, bits, group_size, sym)


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in). transformers' Conv1D, which GPT-2 is made of, is a linear module too."""
    return (linear.nf, linear.nx) if _is_conv1d(linear) else (linear.out_features, linear.in_features)


def linear_weight(linear: Any) -> Tensor:
    """(out, in)."""
    return cast(Tensor, linear.weight.T if _is_conv1d(linear) else linear.weight).detach()


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """By name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _is_conv1d(linear: Any) -> bool:
    return hasattr(linear, "nf") and hasattr(linear, "nx")
