"""Frozen weights that wait in the host's memory, and are on the device only while their layer is computed.

Those of a layer's attention, and then those of its MLP, are copied to the device before the forward pass and dropped
after it; what autograd saved of them is copied again, one weight at a time, when a gradient needs it (the parameter
offloading of Rajbhandari et al. 2021, arXiv:2104.07857, for weights that never change). The numbers are the same to the
bit. The device holds one such part, the embeddings, the head and what learns, and each pass waits for the bus. In host
memory the weights may be mapped from their files (`streaming.mapped_model`): what is read stays in the system's file
cache as long as there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers.modeling_layers import GradientCheckpointingLayer

_LEAST = 1 << 16  # bytes; less is not worth a trip, and stays on the device


class SavedWeight(NamedTuple):
    """What autograd keeps of a weight: where it waits, and which part of it was used."""

    host: Tensor
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def on_device(self) -> Tensor:
        return _copy(self.host, self.device).as_strided(self.size, self.stride, self.offset)


class LayerwiseWeights:
    """The frozen weights of a model's layers, and which of them are on the device just now.

    A part of a layer is a list of pairs: a parameter, and its data in host memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._present: dict[int, Tensor] = {}

    def fetch(self, part: Iterable[tuple[Parameter, Tensor]]) -> None:
        """Copies on the device, in place of the weights that wait."""
        for parameter, host in part:
            parameter.data = _copy(host, self.device)
            self._present[_storage(parameter)] = host

    def leave(self, part: Iterable[tuple[Parameter, Tensor]]) -> None:
        """The weights that wait, in place of their copies."""
        for parameter, host in part:
            self._present.pop(_storage(parameter), None)
            parameter.data = host

    def save(self, tensor: Tensor) -> Tensor | SavedWeight:
        """For autograd, in place of a copy that is to leave the device, or of a view of one."""
        host = self._present.get(_storage(tensor)) if type(tensor) in (Tensor, Parameter) else None
        if host is None:
            return tensor
        return SavedWeight(host, self.device, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


@contextmanager
def layerwise(model: Module, device: torch.device) -> Iterator[LayerwiseWeights]:
    """Inside, the model computes on the device, where the frozen weights of its layers are only as long as they are
    needed. Before and after, all of it is in host memory."""
    weights = LayerwiseWeights(device)
    moving: set[int] = set()
    handles = []
    for part in _parts(model):
        own = [(each, each.data) for each in part.parameters() if not each.requires_grad and each.nbytes >= _LEAST]
        moving.update(id(parameter) for parameter, _ in own)
        handles.append(part.register_forward_pre_hook(lambda *_, own=own: weights.fetch(own)))
        handles.append(part.register_forward_hook(lambda *_, own=own: weights.leave(own), always_call=True))
    staying = [each for each in (*model.parameters(), *model.buffers()) if id(each) not in moving]
    _move(staying, device)
    vars(model)["to"] = lambda *_, **__: model  # transformers and accelerate would move all of it
    try:
        with torch.autograd.graph.saved_tensors_hooks(weights.save, restored):
            yield weights
    finally:
        del vars(model)["to"]
        for handle in handles:
            handle.remove()
        _move(staying, torch.device("cpu"))


def restored(saved: Tensor | SavedWeight) -> Tensor:
    """What `LayerwiseWeights.save` was given."""
    return saved.on_device() if isinstance(saved, SavedWeight) else saved


def _parts(model: Module) -> Iterator[Module]:
    """Attention, MLP and norms of each layer, which are called as modules when a layer is computed again, too: the
    layer itself is not."""
    inside: set[Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            for part in module.children():
                if part not in inside:
                    yield part
                inside.update(part.modules())


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def _copy(host: Tensor, device: torch.device) -> Tensor:
    return host.to(device, copy=True)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
