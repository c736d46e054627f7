"""The tensors that a model really holds, wherever they hide: registered, in tensor subclasses, in plain attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

DEPTH = 4  # objects inside objects that are looked into
_OPAQUE = (str, bytes, int, float, bool, complex, type(None), type)


def resident_tensors(module: Module) -> dict[str, Tensor]:
    """By path, each tensor once: parameters, buffers, what a quantized weight is made of, what is kept beside it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, each in module.named_modules():
        registered = {**each._parameters, **each._buffers}
        plain = {key: value for key, value in vars(each).items() if not _is_machinery(key, value)}
        for key, value in {**plain, **registered}.items():
            for path, tensor in _inside(f"{name}.{key}".lstrip("."), value, seen, DEPTH):
                found[path] = tensor
    return found


def resident_bytes(module: Module) -> int:
    """Bytes of all of them; memory that two of them share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in resident_tensors(module).values()}.values())


def _is_machinery(key: str, value: Any) -> bool:
    from torch.nn import Module

    return isinstance(value, Module) or key in {"_parameters", "_buffers", "_modules"} or key.endswith("_hooks")


def _inside(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    import torch

    if id(value) in seen or isinstance(value, (*_OPAQUE, torch.nn.Module)) or callable(value) or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a subclass that is made of other tensors
            names, _ = value.__tensor_flatten__()
            parts = {name: getattr(value, name) for name in names}
        else:
            yield path, value.detach()
            parts = {}
        parts |= {key: each for key, each in vars(value).items() if not key.startswith("_")}
    elif isinstance(value, dict):
        parts = {str(key): each for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {str(index): each for index, each in enumerate(value)}
    else:
        parts = dict(getattr(value, "__dict__", {}))
    for key, each in parts.items():
        yield from _inside(f"{path}.{key}", each, seen, depth - 1)
