"""Seconds of an optimizer step: operations from the architecture, over a rate that a short probe measures."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from hyperion_core.facts import ModelFacts

from .memory_model import Held, Step, layer_names, layer_of, lowest_learning

#: Share of the matrix product's rate that a whole step reaches: about half on a CPU as measured; an estimate elsewhere.
EFFICIENCY = 0.5
# Operations that unpacking one quantized weight is worth, each time that a pass uses it. An assumption, not measured.
_UNPACKING = 20.0
_PROBE_SECONDS = 1.0
_LEAST_WIDTH = 256  # of a smaller product the calls themselves would be measured


def step_operations(facts: ModelFacts, held: Held, step: Step, tokens: int) -> float:
    """Floating point operations of an optimizer step of so many tokens, in passes of `step.tokens`.

    Forward and backward with respect to activations: 2 operations a weight and token each; the adapter's own
    gradients come on top, and one more forward pass of the layers that are checkpointed. Layers below the first that
    has anything to learn have a forward pass alone.
    """
    layers, lowest = layer_names(facts), max(0, lowest_learning(facts, held.targets))
    learning, again = layers[lowest:], layers[lowest : step.checkpointed]
    times = Counter((*layers, *learning, *again))
    used = sum(times[layer_of(module.name)] * module.parameters for module in facts.linear())
    a_token = 2.0 * used + 6.0 * held.adapter
    # scores and values of the tokens before each one, half a row of them in the mean; twice that backward
    attended = facts.hidden_size * (step.longest or step.document)
    a_token += 2.0 * attended * (times.total() + len(learning))
    learnt = step.learnt() / step.tokens if step.tokens else 0.0
    a_token += 4.0 * facts.hidden_size * facts.vocab_size * learnt
    passes = -(-tokens // max(1, step.tokens))
    unpacked = _UNPACKING * used if held.quantized else 0.0
    return tokens * a_token + passes * unpacked


def step_seconds(operations: float, rate: float) -> float:
    """At `rate` operations a second of a matrix product: an estimate."""
    return operations / (rate * EFFICIENCY)


def measured_rate(width: int, dtype: str, device: str, folder: Path) -> float:
    """Operations a second of a matrix product of the model's width. Imports torch; takes about a second, and is kept in
    `folder`, by machine."""
    width = max(width, _LEAST_WIDTH)
    key = f"{_machine(device)} {dtype} {width}"
    file = folder / "matrix-product-rates.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if float(known[key]) > 0:
            return float(known[key])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}  # not measured yet, or not readable: it is measured again
    rate = _probe(width, dtype, device)
    folder.mkdir(parents=True, exist_ok=True)
    known = known if isinstance(known, dict) else {}
    file.write_text(json.dumps({**known, key: rate}), encoding="utf-8")
    return rate


def _probe(width: int, dtype: str, device: str) -> float:
    import torch

    left = torch.randn(1024, width).to(device, getattr(torch, dtype))
    right = torch.randn(width, width).to(device, getattr(torch, dtype))
    _synchronized(left @ right)
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < _PROBE_SECONDS:
        _synchronized(left @ right)
        rounds += 1
    return 2.0 * 1024 * width * width * rounds / (time.perf_counter() - started)


def _synchronized(product: object) -> None:
    product[0, 0].item()  # type: ignore[index]


def _machine(device: str) -> str:
    import platform

    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{platform.node()} {name} {torch.get_num_threads()} {torch.__version__}"
