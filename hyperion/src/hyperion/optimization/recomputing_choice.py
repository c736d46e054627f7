"""`recompute_layers: auto`, which is the default where the forecast is known to be good: as few layers compute their
activations again as the memory asks for. Imports no torch."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

from ..config import FinetuneConfig
from ..models.hardware import free_memory
from ..training_config import TrainingConfig
from .memory_model import PROCESS

_SWITCHES = ("recompute_layers", "gradient_checkpointing", "activation_checkpointing")
_OPTIONS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
SHARE = 0.9  # of the free memory: other processes want some, too


def with_recomputing(
    config: FinetuneConfig, layers: int, device: str, memory_of: Callable[[FinetuneConfig], Mapping[str, int]]
) -> tuple[FinetuneConfig, str]:
    """The config with a number of layers where it says "auto", and a line for the plan: "" where it does not.

    Args:
        layers: of the base; 0 where nothing is known of it.
        memory_of: peak bytes by part of a run with such a config.
    """
    if config.training.recompute_layers != "auto":
        return config, ""
    free = free_memory(device)
    if not layers or free is None:
        chosen = _with(config, None)
        return chosen, "auto: all layers, for nothing is known of " + ("the free memory" if layers else "the base yet")
    if "torch" not in sys.modules:  # what the libraries will take is not taken yet
        free -= PROCESS[device]
    room = int(free * SHARE)
    count = fewest(layers, lambda tried: sum(memory_of(_with(config, tried)).values()) <= room)
    return _with(config, count), choice_line(count, layers)


def choice_line(count: int, layers: int) -> str:
    """The choice as a line of a plan."""
    return f"auto: {count} of {layers}"


def may_choose(training: TrainingConfig) -> bool:
    """Whether how many layers compute again is left open in what was asked for."""
    said = training.given()
    return said.get("recompute_layers") == "auto" or all(said.get(switch) is None for switch in _SWITCHES)


def fewest(layers: int, fits: Callable[[int], bool]) -> int:
    """How many layers must compute again so that the run fits; all of them where it never does."""
    if fits(0):
        return 0
    # the first costs memory of its own, beyond which each saves some
    return min(layers, 1 + bisect_left(range(1, layers + 1), True, key=fits))


def recomputing(training: TrainingConfig, count: int | None) -> dict[str, Any]:
    """The keys of `training:` with so many layers that compute again; None is all of them.

    Where none does, options of checkpointing would do nothing, and are left out: they are refused then.
    """
    dropped = _SWITCHES if count != 0 else (*_SWITCHES, *_OPTIONS)
    given = {key: said for key, said in training.given().items() if key not in dropped}
    return {**given, **({"gradient_checkpointing": True} if count is None else {"recompute_layers": count})}


def _with(config: FinetuneConfig, count: int | None) -> FinetuneConfig:
    return config.replace(training=recomputing(config.training, count))
