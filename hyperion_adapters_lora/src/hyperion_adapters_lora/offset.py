"""An adapter that starts from a product B₀A₀ which is not zero, on a base that stays as it is. Loaded only with torch.

PEFT subtracts that product from the base's weight. Here the layer computes Wx + s (BA - B₀A₀)x with frozen copies A₀
and B₀ instead, in the form

    BA - B₀A₀ = [B - B₀, B₀] [A; A - A₀],

a LoRA of rank 2r. At the start both B - B₀ and A - A₀ are zero, and with them the update, to the bit; and where the
matrices are cast to bfloat16, what was learnt keeps its digits, which a difference of two large products would lose.

PEFT holds an ordinary layer of rank 2r: its `lora_A[name].weight` and `lora_B[name].weight` are the stacks above, made
anew from what is trained whenever they are asked for (torch.nn.utils.parametrize). So PEFT's own code runs, merges and
scales it, and the stacks are what is saved in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperion_peft.tensors import tuner_layers

from .start import Start

#: Marks a file that holds [A; A₀] and [B, -B₀]: a LoRA that does the same, from which training goes on exactly.
MARK = "hyperion_offset"
_BASE = "base_model.model."


class _Stacked(nn.Module):
    """What is trained, (r, in) or (out, r), to the stack of rank 2r. `start` is its frozen copy."""

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)


class _Down(_Stacked):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([weight, weight - self.start])


class _Up(_Stacked):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([weight - self.start, self.start], dim=1)


def begin(model: nn.Module, name: str, starts: Mapping[str, Start]) -> None:
    """Put the first values into the attached adapter `name`, by names of the base's modules."""
    for path, layer in _layers(model, name):
        start = starts.get(path.removeprefix(_BASE))
        if start is None:
            continue  # PEFT's own start stays
        if start.up is None:
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(start.down)
        else:
            _hold(layer.lora_A[name], _Down, start.down, start.down)
            _hold(layer.lora_B[name], _Up, start.up, start.up)


def halves(model: nn.Module, name: str) -> dict[str, Tensor]:
    """By their keys in a PEFT file, [A; A₀] and [B, -B₀] of every layer that has them; empty where none has."""
    found = {}
    for path, layer in _layers(model, name):
        if parametrize.is_parametrized(layer.lora_A[name]):
            (trained_down, down), (trained_up, up) = _parts(layer.lora_A[name]), _parts(layer.lora_B[name])
            found[f"{path}.lora_A.weight"] = torch.cat([trained_down, down])
            found[f"{path}.lora_B.weight"] = torch.cat([trained_up, -up], dim=1)
    return found


def go_on(model: nn.Module, name: str) -> None:
    """Inverse of `halves`: train what `halves` was of an adapter that was loaded from its tensors."""
    for _, layer in _layers(model, name):
        _hold(layer.lora_A[name], _Down, *layer.lora_A[name].weight.detach().chunk(2))
        trained, negative = layer.lora_B[name].weight.detach().chunk(2, dim=1)
        _hold(layer.lora_B[name], _Up, trained, -negative)


def _hold(linear: nn.Linear, kind: type[_Stacked], trained: Tensor, start: Tensor) -> None:
    before = linear.weight
    linear.weight = nn.Parameter(_own(trained, before), requires_grad=before.requires_grad)
    parametrize.register_parametrization(linear, "weight", kind(_own(start, before)), unsafe=True)


def _own(value: Tensor, like: Tensor) -> Tensor:
    # A decomposition lays its factors out by columns; sums over them would run in another order after a resume.
    return value.to(like, copy=True).contiguous()


def _parts(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """What is trained, and its start."""
    held = cast(Any, linear).parametrizations.weight
    return held.original.detach(), held[0].start


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every linear layer that has `name`; embeddings hold theirs otherwise, and start as usual."""
    return ((path, layer) for path, layer in tuner_layers(model) if name in getattr(layer, "lora_A", ()))
