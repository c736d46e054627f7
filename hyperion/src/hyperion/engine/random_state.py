"""The random number generators of a process, left as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards Python, NumPy and torch go on as if none had been."""
    python, array = random.getstate(), numpy.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)
            if mps is not None:
                torch.mps.set_rng_state(mps)
