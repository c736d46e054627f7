"""Loading that leaves nothing behind. What a quantizer reads in full precision is gone when the model is there.

Two things would stay otherwise: the memory of its many large temporary tensors, which glibc's malloc keeps for later,
and the whole of the weights' files, which stay mapped as long as one tensor that was not quantized lies in them.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE = 1 << 17  # bytes: from here on a tensor gets pages of its own, which go back when it goes
_USUAL = 32 << 20  # what glibc itself comes to once such tensors have been freed
_ASKED = "MALLOC_MMAP_THRESHOLD_"  # mallopt(3): what the user wants in its place


@contextmanager
def returning_memory() -> Iterator[None]:
    """Inside, large tensors that are freed leave the process at once; at the end, so does what else is free.

    Takes time for every large tensor, so it is nothing for a training step. Without glibc it does nothing.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        asked = os.environ.get(_ASKED, "")
        usual = int(asked) if asked.isdecimal() else _USUAL
        libc.mallopt(_MMAP_THRESHOLD, usual)
        libc.mallopt(_TRIM_THRESHOLD, 2 * usual)
        libc.malloc_trim(0)


def own_weights(model: Module) -> None:
    """Move the plain weights and buffers of a model on the CPU out of the files that they are mapped from."""
    from torch import Tensor

    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.data = tensor.data.clone()


@cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
