"""How many bytes bitsandbytes takes for a weight. Torch-free."""

from __future__ import annotations

import math

SCALES_BLOCK = 256  # scales that share a scale of their own, with double quantization
SHARED_MAP = 4 * 256  # the 256 values of an 8-bit scale; modules of a model share them in memory
_VALUE_MAP = 4 * 16  # the 16 values of a 4-bit weight
_RECORD = 80  # JSON that goes to disk with each weight: type, block size, shape
_NESTED_RECORD = 90  # and what double quantization adds to it


def four_bit(rows: int, columns: int, block: int, double_quant: bool) -> tuple[int, int]:
    """(resident, on disk) of one weight; without SHARED_MAP, which is resident once."""
    weights = rows * columns
    blocks = math.ceil(weights / block)
    held = math.ceil(weights / 2) + _VALUE_MAP
    if not double_quant:
        return held + 4 * blocks, held + 4 * blocks + _RECORD
    held += blocks + 4 * math.ceil(blocks / SCALES_BLOCK)
    return held + 4, held + SHARED_MAP + _RECORD + _NESTED_RECORD


def eight_bit(rows: int, columns: int) -> tuple[int, int]:
    """(resident, on disk) of one weight."""
    held = rows * columns + 4 * rows
    return held, held + 1
