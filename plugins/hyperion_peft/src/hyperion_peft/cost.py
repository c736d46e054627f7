"""What an adapter adds to a training step. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from hyperion_core.facts import Cost, ModelFacts, Workload

BYTES = 4  # adapters are held and trained in fp32


def adapter_cost(parameters: int, kept: float, facts: ModelFacts, work: Workload, extra: int = 0) -> Cost:
    """Bytes of the adapter and of what autograd keeps for it.

    Args:
        parameters: trainable parameters.
        kept: bytes kept for the backward pass, a token, over all layers; with checkpointing one layer's at a time.
        extra: bytes that do not depend on the tokens.
    """
    layers = facts.layers if work.checkpointing and facts.layers else 1
    activations = int(work.batch * work.length * kept / layers) + extra
    size = parameters * BYTES
    # 2 operations a parameter forward, 4 backward: to its input and to itself.
    return Cost({"adapter": size, "activations": activations}, disk=size, flops=6.0 * parameters)


def fp32_copy(sizes: Iterable[int], work: Workload) -> int:
    """Bytes a token of inputs that are kept once more in fp32, because the base works in another type."""
    return 0 if work.dtype == "float32" else BYTES * sum(sizes)
