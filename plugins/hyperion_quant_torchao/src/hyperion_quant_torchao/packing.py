"""Integers of 1 to 8 bits in bytes, without a gap. Loaded only with torch.

A number of 7 bits is cut into parts of 4, 2 and 1 bits, one of 5 into 4 and 1, and so on. Where a byte holds k parts,
its first is of the row's first k-th, its second of the second: unpacking then moves whole stretches at a time. It is
the order of torchao's `prototype.dtypes.uintx.bitpacking`, written here because saved models depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` numbers; a multiple of 8 of them leaves no gap."""
    return columns * bits // 8


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 (rows, columns), each below 2^bits, as uint8 (rows, columns * bits / 8). `columns` is a multiple of 8."""
    packed = numbers.new_empty(numbers.shape[0], packed_width(numbers.shape[1], bits))
    for low, size, start, end in _parts(numbers.shape[1], bits):
        part = numbers >> low & (1 << size) - 1
        stretches = part.chunk(8 // size, dim=1)
        packed[:, start:end] = stretches[0]
        for index, stretch in enumerate(stretches[1:], start=1):
            packed[:, start:end] |= stretch << index * size
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 (rows, columns)."""
    numbers = torch.empty(packed.shape[0], packed.shape[1] * 8 // bits, dtype=torch.uint8, device=packed.device)
    for low, size, start, end in _parts(numbers.shape[1], bits):
        part = packed[:, start:end]
        for index, stretch in enumerate(numbers.chunk(8 // size, dim=1)):
            found = (part >> index * size & (1 << size) - 1) << low
            if low:
                stretch |= found
            else:
                stretch.copy_(found)
    return numbers


def _parts(columns: int, bits: int) -> Iterator[tuple[int, int, int, int]]:
    """(lowest bit, bits, first byte, byte after the last) of each part."""
    low, start = 0, 0
    for size in (8, 4, 2, 1):
        if bits & size:
            end = start + packed_width(columns, size)
            yield low, size, start, end
            low, start = low + size, end
