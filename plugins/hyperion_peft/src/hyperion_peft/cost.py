"""What an adapter adds to a training step. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hyperion_core.facts import Cost, Workload

BYTES = 4  # adapters are held and trained in fp32
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def adapter_cost(parameters: int, kept: Mapping[str, float], work: Workload) -> Cost:
    """Bytes of the adapter and of what autograd keeps for it.

    Args:
        parameters: trainable parameters.
        kept: bytes kept for the backward pass, a token, by module; with checkpointing one layer's at a time.
    """
    layers: dict[str, float] = {}
    for module, size in kept.items():
        found = _LAYER.match(module) if work.checkpointing else None
        layer = found[0] if found else ""
        layers[layer] = layers.get(layer, 0) + size
    outside = layers.pop("", 0)
    activations = int(work.batch * work.length * (outside + max(layers.values(), default=0)))
    size = parameters * BYTES
    # 2 operations a parameter forward, 4 backward: to its input and to itself.
    return Cost({"adapter": size, "activations": activations}, disk=size, flops=6.0 * parameters)


def width(work: Workload) -> int:
    """Bytes of a number in the activations' type."""
    return BYTES if work.dtype == "float32" else 2


def fp32_copy(sizes: Iterable[int], work: Workload) -> int:
    """Bytes a token of inputs that are kept once more in fp32, because the base works in another type."""
    return 0 if work.dtype == "float32" else BYTES * sum(sizes)
