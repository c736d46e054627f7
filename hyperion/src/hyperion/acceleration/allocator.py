"""The C library's allocator, told to give back what is freed, where memory counts for more than time."""

from __future__ import annotations

import ctypes
import platform

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3), glibc
_LARGE = 1 << 17  # bytes, where glibc itself begins


def give_back_large_blocks() -> None:
    """From here on each block of 128 KiB or more is mapped by itself, and unmapped when it is freed.

    glibc begins so, but raises that bound, up to 32 MiB, each time such a block is freed, and keeps what is smaller: of
    tensors that come and go in turn, holes are left that none of the next fits into. With activations on disk they were
    more than half of what a run held. Mapping costs time: with a bound of a MiB 10 to 16% of a step of SmolLM2-135M.
    Nothing happens where the library is not glibc; the process keeps the setting.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
