"""A rough forecast of peak memory, from the architecture alone."""

from __future__ import annotations

from hyperion_core.facts import Cost, ModelFacts, Workload

from .engine.chunk import LOGITS_CHUNK

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Numbers that an optimizer keeps for each one it trains, by what transformers' name of it begins with; AdamW's two
# where it is none of these.
_STATES = {"sgd": 0, "adafactor": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3}


def forecast(
    facts: ModelFacts, adapter: Cost, quantizer: Cost | None, work: Workload, optim: str | None = None
) -> dict[str, int]:
    """Peak bytes by part: weights, adapter, gradients, optimizer, activations, logits.

    Activations count, for every linear module, one input and one output a token, in the base's type: what autograd
    keeps, to within the architecture's own extras. It is a forecast for choosing a batch size by, not a promise.

    Args:
        optim: the optimizer, by transformers' name; None is AdamW.
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
        "optimizer": _optimizer(trained, optim or ""),
        "activations": tokens * kept * size + adapter.memory.get("activations", 0),
        "logits": 3 * 4 * min(tokens, LOGITS_CHUNK) * facts.vocab_size,
    }


def _optimizer(trained: int, name: str) -> int:
    """Bytes of what it keeps beside so many bytes of float32 that are trained."""
    name = name.removeprefix("paged_")
    states = next((count for kind, count in _STATES.items() if name.startswith(kind)), 2)
    numbers = trained // 4 * states
    return numbers if "8bit" in name else numbers // 2 if "4bit" in name else 4 * numbers
