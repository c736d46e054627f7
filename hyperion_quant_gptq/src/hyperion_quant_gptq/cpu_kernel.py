"""Fast products on a CPU: torch's own kernel for weights in 4 bits. Loaded only with torch.

A token that is generated reads every weight once: in 4 bits a quarter of bfloat16's bytes. torch has a kernel that
unpacks them in registers (`aten::_weight_int4pack_mm_for_cpu`, fast in bfloat16), which is what it is bound by where
there is no AVX-512; it computes (q - 8) * scale + offset, in groups along a row. 2 and 3 bits fit into it, 8 are two
weights of 4 bits. Grids with zero points of their own do not: they take more room, or, by way of the offset, lose
digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouping import KERNEL_GROUP_SIZES

_ROWS = 16  # a multiple of so many outputs
_MOST_INPUTS = 256  # of more it is faster to unpack the weight once
_MIDDLE = 8
# a constant: what asks for it may be compiled
_MULTIPLIES_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_kernel = torch.ops.aten._weight_int4pack_mm_for_cpu.default


def suits(shape: tuple[int, int], group_size: int) -> bool:
    """Whether the kernel takes weights of this shape, (out, in), and is fast: not on processors other than x86's."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return fast and group_size in KERNEL_GROUP_SIZES and shape[0] % _ROWS == 0


def serves(x: Tensor) -> bool:
    """Whether it can multiply these inputs, (..., in), and is the faster way. Never where gradients are wanted: it has
    none."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.numel() <= _MOST_INPUTS * x.shape[-1]
    )


def unpacked_product(x: Tensor, weight: Tensor) -> Tensor:
    """x · Wᵀ in the type of x, (..., in) by (out, in). A processor that cannot multiply bfloat16 computes in float32:
    torch's own product goes that way on one core alone."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _MULTIPLIES_BFLOAT16:
        return (x.float() @ weight.float().T).to(x.dtype)
    return x @ weight.to(x.dtype).T


class KernelWeight:
    """(numbers - 2^(bits - 1)) * scale, as the kernel wants it; scales are rounded to bfloat16.

    Args:
        numbers: uint8 (out, in), below 2^bits.
        scale: (out, groups).
    """

    def __init__(self, numbers: Tensor, scale: Tensor, bits: int) -> None:
        scale = scale.float()
        self.group_size = numbers.shape[1] // scale.shape[1]
        if bits <= 4:
            self.parts = [_part(numbers + (_MIDDLE - 2 ** (bits - 1)), scale, torch.zeros_like(scale))]
        else:
            above = _part(numbers >> 4, 16 * scale, torch.zeros_like(scale))
            self.parts = [above, _part(numbers & 15, scale, _MIDDLE * scale)]

    def product(self, x: Tensor) -> Tensor:
        """x · Wᵀ: bfloat16 (..., in) to (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        first, *others = self.parts
        y: Tensor = _kernel(flat, first[0], self.group_size, first[1])
        for packed, scale_and_offset in others:
            y += _kernel(flat, packed, self.group_size, scale_and_offset)
        return y.view(*x.shape[:-1], -1)


def _part(numbers: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int().contiguous(), 1)
    return packed, torch.stack([scale.T, offset.T], -1).bfloat16().contiguous()
