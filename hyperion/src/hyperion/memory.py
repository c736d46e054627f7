"""Peak memory of a planned run: what its config means for the memory model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hyperion_core.facts import Cost, ModelFacts, Workload

from .acceleration.documents import pack_capacity
from .optimization.memory_model import BYTES, COUNTED, Held, Step, layer_names, layer_of, layers_of, peak_memory

if TYPE_CHECKING:
    from .config import FinetuneConfig
    from .training_config import TrainingConfig

_KEPT_DOCUMENT = 512  # of rows up to so many tokens attention keeps most


def why_padded(training: TrainingConfig) -> str:
    """Why rows are certain to be padded; "" where the model decides, which shows when it is loaded."""
    if training.neftune_noise_alpha:
        return "with neftune_noise_alpha a row's noise depends on its length"
    return "packing is false; packed, it would learn the same" if training.packing is False else ""


def pads(training: TrainingConfig) -> bool:
    """Whether rows are certain to be padded."""
    return bool(why_padded(training))


def counted(training: TrainingConfig, facts: ModelFacts) -> bool:
    """Whether a run's forecast is of those whose error is known (benchmarks/results/memory-prediction.md): of a model
    whose layers are counted tensor by tensor, of rows in packs, in fused layers, all in memory."""
    layers = sum(layer.keys() >= COUNTED for layer in layers_of(facts))
    moved = training.stream_weights or training.offload_activations is not None
    return layers == facts.layers > 0 and training.fused_layers and not pads(training) and not moved


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
    where: dict[str, Any] = {"device": device, "offloaded": away, "gives_back": away or training.stream_weights}
    if pads(training):
        return Step(batch * length, length, dtype, None, checkpointed, fused=False, **where)
    capacity = pack_capacity(training.pack_length, length, batch, device)
    tokens = min(capacity, length * batch * training.gradient_accumulation_steps)
    document = min(length, _KEPT_DOCUMENT)
    return Step(tokens, document, dtype, None, checkpointed, fused=training.fused_layers, longest=length, **where)


def with_new_rows(config: FinetuneConfig, facts: ModelFacts, targets: Sequence[str]) -> tuple[str, ...]:
    """All that learns: the adapter's `targets`, and the embeddings where the run adds rows to them."""
    embeddings = (module.name for module in facts.modules if module.kind == "embedding" and config.new_tokens)
    return (*targets, *embeddings)


def adapter_cost(
    estimate: Callable[[Workload], Cost], config: FinetuneConfig, facts: ModelFacts, step: Step, targets: Sequence[str]
) -> Cost:
    """What the adapter takes at such a step, and the embedding rows that the run adds, of which no adapter can know
    while planning.

    Args:
        estimate: what the adapter's plugin reckons for a workload.
        targets: full names of the modules that learn.
    """
    padded = pads(config.training)
    rows = config.training.per_device_train_batch_size if padded else 1  # a pack is one row to the model
    work = Workload(rows, step.tokens // rows, not padded, step.dtype)
    cost = estimate(work)
    if step.checkpointed or step.offloaded:
        one = estimate(replace(work, checkpointing=True))
        again = frozenset(layer_names(facts)[: None if step.offloaded else step.checkpointed])
        share = sum(layer_of(name) in again for name in targets) / max(1, len(targets))
        freed = cost.memory.get("activations", 0) - one.memory.get("activations", 0)
        cost = cost + Cost({"activations": -int(share * freed)})
    added = len(config.new_tokens) * facts.hidden_size * (1 if facts.tied_embeddings else 2)
    return cost + Cost({"adapter": 4 * added})


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
        adapter, quantizer: what the plugins reckon for such a step; without a quantizer the base is held in its type.
        optim: the optimizer, by transformers' name; None is AdamW.
        targets: full names of the modules that have an adapter.
        streams: the base stays in its files, of which a layer and the head are resident at a time.
    """
    return peak_memory(facts, held_before(facts, adapter, quantizer, step, targets, streams=streams), step, optim or "")


def held_before(
    facts: ModelFacts, adapter: Cost, quantizer: Cost | None, step: Step, targets: Sequence[str], *,
    streams: bool = False,
) -> Held:  # fmt: skip
    """What is there before a step, of what the plugins reckon."""
    weights = quantizer.memory.get("weights", 0) if quantizer else facts.parameters * BYTES[step.dtype]
    if streams:
        # a layer's go when it has been computed; the head's stay until the next pass, and of the embedding a few rows
        # are read from the file, but a GPU has all of it
        inside = {module.name for layer in layers_of(facts) for module in layer.values()}
        layers = [sum(m.parameters for m in layer.values()) for layer in layers_of(facts)]
        outside = [module.parameters for module in facts.modules if module.name not in inside]
        ends = max(outside, default=0) if step.device == "cpu" else sum(outside)
        weights = (ends + max(layers, default=0)) * BYTES[step.dtype]
    loading = quantizer.memory.get("loading", 0) if quantizer else 0
    trained, frozen, kept = (adapter.memory.get(part, 0) for part in ("adapter", "weights", "activations"))
    return Held(weights, trained // 4, tuple(targets), quantizer is not None, loading, frozen, kept)
