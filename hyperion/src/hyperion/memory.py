"""Peak memory of a planned run: what its config means for the memory model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperion_core.facts import Cost, ModelFacts

from .optimization.memory_model import BYTES, Held, Step, layers_of, peak_memory

if TYPE_CHECKING:
    from .training_config import TrainingConfig

_USUAL_PACK = 1024  # tokens, on a CPU: see engine/fit.py
_KEPT_DOCUMENT = 512  # of rows up to so many tokens attention keeps most


def planned_step(training: TrainingConfig, facts: ModelFacts, length: int, dtype: str, device: str) -> Step:
    """The largest pass that a run can come to.

    Args:
        length: tokens of the longest row.
    """
    batch = training.per_device_train_batch_size
    checkpointed = training.layers_to_recompute()
    if checkpointed is None:
        checkpointed = facts.layers if training.checkpoints_activations() else 0
    away = training.offload_activations is not None
    if training.packing is False:
        return Step(batch * length, length, dtype, None, checkpointed, fused=False, device=device, offloaded=away)
    usual = _USUAL_PACK if device == "cpu" else length * batch
    capacity = max(length, training.pack_length or usual)
    tokens = min(capacity, length * batch * training.gradient_accumulation_steps)
    document = min(length, _KEPT_DOCUMENT)
    fused = training.fused_layers
    return Step(tokens, document, dtype, None, checkpointed, fused=fused, device=device, offloaded=away)


def forecast(
    facts: ModelFacts,
    adapter: Cost,
    quantizer: Cost | None,
    step: Step,
    optim: str | None = None,
    targets: Sequence[str] = (),
    *,
    streams: bool = False,
) -> dict[str, int]:
    """Peak bytes by part, above what the process holds before the weights load.

    Args:
        adapter, quantizer: what the plugins reckon; without a quantizer the base is held in the step's type.
        optim: the optimizer, by transformers' name; None is AdamW.
        targets: full names of the modules that have an adapter.
        streams: the base stays in its files, of which two layers are resident at a time.
    """
    return peak_memory(facts, held_before(facts, adapter, quantizer, step, targets, streams=streams), step, optim or "")


def held_before(
    facts: ModelFacts, adapter: Cost, quantizer: Cost | None, step: Step, targets: Sequence[str], *,
    streams: bool = False,
) -> Held:  # fmt: skip
    """What is there before a step, of what the plugins reckon."""
    weights = quantizer.memory.get("weights", 0) if quantizer else facts.parameters * BYTES[step.dtype]
    if streams:
        layers = [sum(m.parameters for m in layer.values()) for layer in layers_of(facts)]
        weights = (facts.parameters - sum(layers) + 2 * max(layers, default=0)) * BYTES[step.dtype]
    loading = quantizer.memory.get("loading", 0) if quantizer else 0
    return Held(weights, adapter.memory.get("adapter", 0) // 4, tuple(targets), quantizer is not None, loading)
