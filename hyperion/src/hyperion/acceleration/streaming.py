"""Frozen weights that stay in their file: mapped into memory, read layer by layer, and let go of again.

The weights of a base are never written to, so its safetensors files can stand in for memory: the operating system
reads what a layer needs when it needs it, and what was read is dropped as soon as the layer is done, forward and
backward. A model then trains in the memory of a few layers; how fast depends on the disk, and on how much of the file
the system keeps in its own cache.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from hyperion_core.errors import ModelError
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .allocator import give_back_large_blocks

_PAGE = mmap.PAGESIZE
_DONT_NEED = 4  # of madvise(2), on Linux and on macOS
_MAPPED = "hyperion_mapped"  # on a parameter: its address in the mapping, and its version while it is the file's


def mapped_model(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in `folder`, its parameters mapped from the folder's safetensors files.

    Raises:
        ModelError: the files hold the weights in another type than `dtype`, or not as this architecture has them.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    tensors = _mapped(folder)
    if other := sorted({_named(tensor.dtype) for tensor in tensors.values()} - {_named(dtype)}):
        raise ModelError(
            f"{folder}: the weights cannot be streamed from their files",
            why=f"they are stored as {', '.join(other)}, and the run computes in {_named(dtype)}",
            fix=f"set dtype: {other[0]}, or leave training.stream_weights out",
        )
    missing, unexpected = model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    if unexpected or any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{folder}: the weights cannot be streamed from their files",
            why=f"their names are not those of the architecture's parameters: {', '.join([*missing, *unexpected][:3])}",
            fix="leave training.stream_weights out, or save the model again with the installed transformers",
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for parameter in model.parameters():
        setattr(parameter, _MAPPED, (parameter.data_ptr(), parameter._version))
    loaded: PreTrainedModel = model.eval()
    return loaded


def let_go(weight: Tensor) -> None:
    """Of the pages of one mapped parameter that has been read."""
    _Resident([weight], frozen=True).drop()


@contextmanager
def streamed(model: Module) -> Iterator[None]:
    """Inside, the frozen parameters of each layer leave memory when the layer has been computed, forward or backward.

    Only for a model of `mapped_model`: parameters that are not mapped, or were changed in place, stay. What is written
    through a parameter's `.data` is not seen as a change: it may be gone after the layer.
    """
    give_back_large_blocks()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = _Resident(parameter for parameter in model.parameters() if id(parameter) not in inside)
    handles = []
    for number, layer in enumerate(layers):
        own = _Resident(layer.parameters())
        handles.append(layer.register_forward_hook(lambda *_, own=own: own.drop()))
        handles.append(layer.register_full_backward_hook(lambda *_, own=own: own.drop()))
        if number == 0:  # embeddings and head: their turn was before
            handles.append(layer.register_forward_pre_hook(lambda *_: outside.drop()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Resident:
    """Mapped parameters that are frozen."""

    def __init__(self, parameters: Iterable[Tensor], *, frozen: bool = False) -> None:
        self._found = [
            (parameter, getattr(parameter, _MAPPED))
            for parameter in parameters
            if hasattr(parameter, _MAPPED) and (frozen or not parameter.requires_grad)
        ]

    def drop(self) -> None:
        """Let go of their pages; they are read from the file again when they are needed."""
        for parameter, mapped in self._found:
            # one that was written to, or replaced, is no longer what the file holds
            if (parameter.data_ptr(), parameter._version) == mapped:
                release(parameter)


def release(mapped: Tensor) -> None:
    """Of the pages that a tensor in a mapped file fills: they are read again when they are needed."""
    start = mapped.data_ptr()
    first = -(-start // _PAGE) * _PAGE
    length = (start + mapped.nbytes) // _PAGE * _PAGE - first
    if length > 0:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONT_NEED)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mapped(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        with safe_open(folder / name, framework="pt") as opened:
            tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
    return tensors
