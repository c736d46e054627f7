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
from hyperion_core.errors import ModelError
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter
from transformers.modeling_layers import GradientCheckpointingLayer

_LEAST = 1 << 16  # bytes; less is not worth a trip, and stays on the device
_Slot = tuple[Module, str, Parameter]  # a module's name for a parameter, and that in host memory


class SavedWeight(NamedTuple):
    """What autograd keeps of a weight: a view of it where it waits."""

    host: Tensor
    device: torch.device


class LayerwiseWeights:
    """The frozen weights of a model's layers, and which of them are on the device just now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._present: dict[int, Tensor] = {}

    def fetch(self, slots: Iterable[_Slot]) -> None:
        """Parameters on the device, in place of those that wait. Others, for autograd keeps a frozen parameter by what
        it is, whatever its data is when the gradient asks for it."""
        for module, name, host in slots:
            copy = Parameter(_copy(host.data, self.device), requires_grad=False)
            self._present[_storage(copy)] = host.data
            module._parameters[name] = copy

    def leave(self, slots: Iterable[_Slot]) -> None:
        """Those that wait, in place of their copies."""
        for module, name, host in slots:
            present = module._parameters[name]
            if present is not None and present is not host:
                self._present.pop(_storage(present), None)
            module._parameters[name] = host

    def save(self, tensor: Tensor) -> Tensor | SavedWeight:
        """For autograd, in place of a copy that is to leave the device, or of a view of one."""
        host = self._present.get(_storage(tensor)) if type(tensor) in (Tensor, Parameter) else None
        if host is None:
            return as_it_is(tensor)
        start = host.storage_offset() + tensor.storage_offset()
        return SavedWeight(host.as_strided(tensor.size(), tensor.stride(), start), self.device)


@contextmanager
def layerwise(model: Module, device: torch.device) -> Iterator[LayerwiseWeights]:
    """Inside, the model computes on the device, where the frozen weights of its layers are only as long as they are
    needed. Before and after, all of it is in host memory.

    Raises:
        ModelError: the model does not tell its layers.
    """
    parts = {part: list(_waiting(part)) for part in _parts(model)}
    if not parts:
        raise ModelError(
            f"the weights of {type(model).__name__} cannot be brought to {device} layer by layer",
            why="none of its modules is a layer that transformers could checkpoint, so they are not told apart",
            fix="leave training.stream_weights out, or take a quantized base",
        )
    weights = LayerwiseWeights(device)
    waiting = {id(host) for slots in parts.values() for *_, host in slots}
    staying = [each for each in (*model.parameters(), *model.buffers()) if id(each) not in waiting]
    handles = []
    try:
        for part, slots in parts.items():
            handles.append(part.register_forward_pre_hook(lambda *_, slots=slots: weights.fetch(slots)))
            handles.append(part.register_forward_hook(lambda *_, slots=slots: weights.leave(slots), always_call=True))
        _move(staying, device)
        vars(model)["to"] = lambda *_, **__: model  # transformers and accelerate would move all of it
        with torch.autograd.graph.saved_tensors_hooks(weights.save, restored):
            yield weights
    finally:
        vars(model).pop("to", None)
        for handle in handles:
            handle.remove()
        for slots in parts.values():  # an interruption may have come while one was there
            weights.leave(slots)
        _move(staying, torch.device("cpu"))


def as_it_is(tensor: Tensor) -> Tensor:
    """For autograd to keep: never the tensor itself, for an operation that keeps its own result would be kept by it,
    and stay in memory where no gradient comes to it. Tensors of other kinds are weights, no results."""
    return tensor.detach() if type(tensor) in (Tensor, Parameter) else tensor


def restored(saved: Tensor | SavedWeight) -> Tensor:
    """What `LayerwiseWeights.save` was given."""
    return _copy(saved.host, saved.device) if isinstance(saved, SavedWeight) else saved


def _parts(model: Module) -> list[Module]:
    """Attention, MLP and norms of each layer, which are called as modules when a layer is computed again, too: the
    layer itself is not."""
    inside: set[Module] = set()
    found: dict[Module, None] = {}  # layers may have a part in common
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            inside.update(module.modules())
            found.update(dict.fromkeys(_called(module)))
    return list(found)


def _called(layer: Module) -> Iterator[Module]:
    for child in layer.children():
        layers = any(isinstance(module, GradientCheckpointingLayer) for module in child.modules())
        if layers or isinstance(child, (ModuleList, ModuleDict)):  # lists are not called, and layers call parts again
            yield from _called(child)
        else:
            yield child


def _waiting(part: Module) -> Iterator[_Slot]:
    """The weights of a part that are worth the trip."""
    for module in part.modules():
        for name, each in module.named_parameters(recurse=False):
            if not each.requires_grad and each.nbytes >= _LEAST and each.is_contiguous():
                yield module, name, each


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def _copy(host: Tensor, device: torch.device) -> Tensor:
    return host.to(device, copy=True)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
