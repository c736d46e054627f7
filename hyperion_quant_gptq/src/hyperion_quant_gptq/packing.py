"""Integers of 2, 3, 4 or 8 bits in words of 32, as checkpoints of GPTQ hold them. Loaded only with torch.

Number i takes the bits from `i * bits` on, counted from the lowest of the first word: with 3 bits 32 numbers fill three
words, and two of them lie across a border.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32
#: Version 1 of the format holds zero points less one: this much in a word of them. 3 bits are counted one by one.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 (count, columns), each below 2^bits, as int32 (count * bits / 32, columns)."""
    words = torch.zeros(numbers.shape[0] * bits // _WORD, numbers.shape[1], dtype=torch.int64, device=numbers.device)
    period, length = _period(bits)
    for index in range(period):
        part = numbers[index::period].long()
        word, place = divmod(index * bits, _WORD)
        words[word::length] |= part << place & 0xFFFFFFFF
        if place + bits > _WORD:
            words[word + 1 :: length] |= part >> (_WORD - place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 (count, columns)."""
    numbers = torch.empty(words.shape[0] * _WORD // bits, words.shape[1], dtype=torch.uint8, device=words.device)
    period, length = _period(bits)
    for index in range(period):
        word, place = divmod(index * bits, _WORD)
        part = words[word::length] >> place  # what the sign fills in from above is cut off below
        if place + bits > _WORD:
            low = _WORD - place
            part = part & (1 << low) - 1 | words[word + 1 :: length] << low
        numbers[index::period] = (part & (1 << bits) - 1).to(torch.uint8)
    return numbers


def pack_zeros(zeros: Tensor, bits: int, version: int) -> Tensor:
    """Zero points, uint8 (groups, out), as int32 (groups, out * bits / 32) of version 1 or 2 of the format."""
    if version == 1 and bits == 3:
        zeros = zeros - 1 & 7
    words = pack(zeros.T, bits).T.contiguous()
    return words - _ONES[bits] if version == 1 and bits != 3 else words


def unpack_zeros(words: Tensor, bits: int, version: int) -> Tensor:
    """The inverse: uint8 (groups, out). As gptqmodel reads version 1: one is added to a whole word, carries and all."""
    if version == 1 and bits != 3:
        words = words + _ONES[bits]
    zeros = unpack(words.T, bits).T
    return zeros + 1 & 7 if version == 1 and bits == 3 else zeros


def _period(bits: int) -> tuple[int, int]:
    """(numbers, words) after which everything repeats."""
    return (32, 3) if bits == 3 else (_WORD // bits, 1)
