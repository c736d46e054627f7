"""Activations that wait for the backward pass outside the device's memory: in RAM, or in files on disk.

What autograd saves is written out as it is saved, and read back when its gradient is computed (as in Rajbhandari et al.
2021, arXiv:2104.07857, for activations). The numbers are the same to the bit. Weights, which lie in memory anyway, and
small tensors stay where they are.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..disk import writing
from .allocator import give_back_large_blocks
from .layerwise import LayerwiseWeights, SavedWeight, as_it_is, restored
from .streaming import release

Place = Literal["ram", "disk"]

_LEAST = 1 << 16  # bytes; less is not worth a trip


class _Away(NamedTuple):
    tensor: Tensor
    device: torch.device


@contextmanager
def offloaded(model: Module, place: Place, folder: Path, weights: LayerwiseWeights | None = None) -> Iterator[None]:
    """Inside, what the forward pass of `model` saves for the backward pass is in `place`.

    Args:
        folder: the run's, on the disk that is to hold it; nothing is left there.
        weights: those that come to the device and leave it; they are none of what is written out.

    Raises:
        TrainingError: the disk refused, here or in the forward pass.
    """
    give_back_large_blocks()
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    scratch = folder
    if place == "disk":
        with writing("the activations", folder):
            scratch = Path(tempfile.mkdtemp(prefix=".activations-", dir=folder))
    names = itertools.count()

    def pack(tensor: Tensor) -> Tensor | SavedWeight | _Away:
        if weights is not None and isinstance(weight := weights.save(tensor), SavedWeight):
            return weight
        if type(tensor) is not Tensor or tensor.nbytes < _LEAST or tensor.untyped_storage().data_ptr() in held:
            return as_it_is(tensor)
        if place == "disk":
            with writing("the activations", folder):
                return _Away(_in_file(tensor, scratch / str(next(names))), tensor.device)
        away = _empty(tensor, pin_memory=tensor.is_cuda)
        return _Away(away.copy_(tensor), tensor.device)

    def unpack(found: Tensor | SavedWeight | _Away) -> Tensor:
        return found.tensor.to(found.device) if isinstance(found, _Away) else restored(found)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        if place == "disk":
            shutil.rmtree(scratch, ignore_errors=True)


def _empty(like: Tensor, *, pin_memory: bool) -> Tensor:
    return torch.empty_strided(like.shape, _strides(like), dtype=like.dtype, pin_memory=pin_memory)


def _in_file(tensor: Tensor, file: Path) -> Tensor:
    """A copy that is mapped from a file, whose pages leave memory at once; the file goes with the copy."""
    _reserve(file, tensor.nbytes)
    storage = torch.UntypedStorage.from_file(str(file), True, tensor.nbytes)
    file.unlink()
    copy = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, _strides(tensor))
    copy.copy_(tensor)
    release(copy)
    return copy


def _reserve(file: Path, size: int) -> None:
    """Make a file that has its bytes on the disk: where they are missing when a mapping is written to, the system ends
    the process.

    Raises:
        OSError: the disk has no room for them.
    """
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(opened.fileno(), 0, size)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own where it fills what it spans, so that its gradient is summed in the same order; else those in a row."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span == tensor.numel():
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()
