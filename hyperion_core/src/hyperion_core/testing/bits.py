"""Tensors compared by their bits. Imports torch only when called."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def equal(one: Tensor, two: Tensor) -> bool:
    """Same shape, same type, same bits."""
    import torch

    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def saved_tensors(path: Path) -> list[Tensor]:
    """What a safetensors file holds; [] for another file."""
    if path.suffix != ".safetensors":
        return []
    from safetensors.torch import load_file

    return list(load_file(path).values())


def digest(value: Tensor) -> str:
    """Of type, shape and bits."""
    import torch

    array = value.detach().cpu().contiguous()
    head = f"{array.dtype}{tuple(array.shape)}".encode()
    return hashlib.sha256(head + array.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
