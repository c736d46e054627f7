"""A rough forecast of peak memory, from the architecture alone."""

from __future__ import annotations

from hyperion_core.facts import Cost, ModelFacts, Workload

from .engine.chunk import LOGITS_CHUNK

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def forecast(facts: ModelFacts, adapter: Cost, quantizer: Cost | None, work: Workload) -> dict[str, int]:
    """Peak bytes by part: weights, adapter, gradients, optimizer, activations, logits.

    Activations count, for every linear module, one input and one output a token, in the base's type: what autograd
    keeps, to within the architecture's own extras. AdamW's two moments are taken for the optimizer. It is a forecast
    for choosing a batch size by, not a promise.
    """
    size = _BYTES[work.dtype]
    tokens = work.batch * work.length
    weights = quantizer.memory.get("weights", 0) if quantizer else facts.parameters * size
    trained = adapter.memory.get("adapter", 0)
    kept = sum(sum(module.shape) for module in facts.linear())
    if work.checkpointing and facts.layers:
        # One layer's activations at a time, and every layer's input.
        kept = kept // facts.layers + facts.layers * facts.hidden_size
    return {
        "weights": weights,
        "adapter": trained,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": tokens * kept * size + adapter.memory.get("activations", 0),
        "logits": 3 * 4 * min(tokens, LOGITS_CHUNK) * facts.vocab_size,
    }
