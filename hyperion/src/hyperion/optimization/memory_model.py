"""Peak memory of a training run by part, from the architecture alone. Imports no torch.

What autograd keeps for the backward pass is counted tensor by tensor, for Llama-like models whose rows are packed and
whose layers are fused (`acceleration/`): a test holds the count against autograd itself, byte for byte. Of the adapter
it counts what its modules make the base keep, the inputs of theirs among it; what is kept for the adapter itself its
plugin says. Padding, other architectures and layers that are not fused are reckoned as torch's own modules keep them:
mostly more than is kept, and no exact count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from hyperion_core.facts import MiB, ModelFacts, ModuleFact, is_output_head

from ..engine.chunk import logits_chunk

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# What the process holds before any weights: Python, torch and the libraries. On a CPU as measured; a GPU's context is
# an estimate.
PROCESS = {"cpu": 640 * MiB, "cuda": 600 * MiB, "mps": 640 * MiB}

# Of `beyond_tensors`: how much of each there is, from `benchmarks/memory_prediction.py --fit`, on Linux with glibc.
ALLOCATOR = {"sixteen bits": 43.11, "activations": 0.55, "logits": 1.39, "unpacked": 4.99, "again": 3.67}

# Of acceleration/attention.py: queries of a block, and tokens of a document whose probabilities are kept.
_BLOCK = 128
_KEPT_DOCUMENT = 512
_GATED = ("gate_proj", "up_proj", "down_proj")
#: The linear modules of a layer that is counted tensor by tensor.
COUNTED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", *_GATED})
_HEAD_WIDTH = 64  # the field's usual one, where the config does not say

# Numbers that an optimizer keeps for each one it trains, by what transformers' name of it begins with; AdamW's two
# where it is none of these.
_STATES = {"sgd": 0, "adafactor": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3, "muon": 1}


@dataclass(frozen=True, slots=True)
class Step:
    """What a device computes at one time: one forward and backward pass.

    Args:
        tokens: of the pack, or of the padded batch, padding counted.
        document: tokens of each row in it; the last may be shorter.
        longest: tokens of the longest row, where `document` is a shorter one of which more is kept; 0 is `document`.
        supervised: tokens that are learnt; None is all but the first of each row.
        checkpointed: layers, from the first, that compute their activations again.
        fused: rows are packed and layers are fused.
        offloaded: activations wait elsewhere for the backward pass, all but those of the layer at hand.
        gives_back: the allocator gives back what is freed, as it does where activations or weights are elsewhere.
    """

    tokens: int
    document: int
    dtype: str = "float32"
    supervised: int | None = None
    checkpointed: int = 0
    fused: bool = True
    device: str = "cpu"
    offloaded: bool = False
    longest: int = 0
    gives_back: bool = False

    def documents(self) -> list[int]:
        full, rest = divmod(self.tokens, max(1, self.document))
        return [self.document] * full + ([rest] if rest else [])

    def learnt(self) -> int:
        return self.tokens - len(self.documents()) if self.supervised is None else self.supervised


@dataclass(frozen=True, slots=True)
class Held:
    """What is there before a step, and what the adapter adds to it. `weights`: bytes of the base; `adapter`: trainable
    numbers; `targets`: the modules that have any, by full name; `quantized`: weights are unpacked when they are used;
    `loading`: bytes of the files that are read beside the weights, where loading quantizes; `frozen`: bytes of the
    adapter that do not train; `kept`: bytes that autograd keeps for the adapter beside the inputs of its modules."""

    weights: int
    adapter: int = 0
    targets: tuple[str, ...] = ()
    quantized: bool = False
    loading: int = 0
    frozen: int = 0
    kept: int = 0


def peak_memory(facts: ModelFacts, held: Held, step: Step, optim: str = "") -> dict[str, int]:
    """Bytes by part at the moment of the peak; their sum is the peak above what the process held before.

    Args:
        facts: a model that is known.
        optim: the optimizer, by transformers' name; "" is AdamW.
    """
    trained = 4 * held.adapter
    logits = logits_bytes(facts, step)
    behind = backward_bytes(facts, held, step)
    parts = {
        "weights": held.weights,
        "adapter": trained + held.frozen,
        "gradients": trained,
        "optimizer": optimizer_bytes(trained, optim),
        "activations": kept_bytes(facts, held, step),
        "logits": logits,
        # the logits are gone when the layers' backward pass begins: of the two, the peak has the larger
        "workspace": max(0, behind - logits),
    }
    if step.device == "cpu":
        parts["allocator"] = 0 if step.gives_back else allocator_bytes(facts, held, step, parts)
        # loading is over when the rest begins; on another device the files are not in its memory
        beyond = held.weights + held.loading - sum(parts.values())
        parts["workspace"] += max(0, beyond)
    return parts


def allocator_bytes(facts: ModelFacts, held: Held, step: Step, parts: Mapping[str, int]) -> int:
    """What a CPU's allocator and its kernels hold beyond the tensors, as measured."""
    return int(sum(ALLOCATOR[name] * size for name, size in beyond_tensors(facts, held, step, parts).items()))


def beyond_tensors(facts: ModelFacts, held: Held, step: Step, parts: Mapping[str, int]) -> dict[str, float]:
    """What `ALLOCATOR` counts in, in bytes.

    Kernels of 16-bit types have a workspace of their own; between activations and logits of different sizes holes are
    left that no later tensor fits into; the weights of a quantized layer are unpacked, which shows in float32; and what
    a layer keeps that is computed again lies between gradients that come and go.
    """
    layer = max((sum(m.shape[0] * m.shape[1] for m in each.values()) for each in layers_of(facts)), default=0)
    return {
        "sixteen bits": 1e6 if BYTES[step.dtype] == 2 else 0.0,
        "activations": parts["activations"],
        "logits": parts["logits"],
        "unpacked": 4.0 * layer if held.quantized and step.dtype == "float32" else 0.0,
        "again": max(_layers_bytes(facts, held, step)[: step.checkpointed], default=0),
    }


def kept_bytes(facts: ModelFacts, held: Held, step: Step) -> int:
    """What autograd keeps of one forward pass."""
    size, tokens = BYTES[step.dtype], step.tokens
    layers, lowest = layers_of(facts), lowest_learning(facts, held.targets)
    own = _layers_bytes(facts, held, step)
    total = max(own, default=0) if step.offloaded else sum(own[step.checkpointed :])
    if step.checkpointed and not step.offloaded:
        # every one's input from the lowest that learns, and of all that are computed again one at a time
        total += max(0, min(step.checkpointed, len(own)) - max(0, lowest)) * tokens * facts.hidden_size * size
        again = max(own[: step.checkpointed], default=0)
        freed = sum(own[step.checkpointed :])
        total = max(total, total - freed + again)
    total += held.kept
    total += tokens * (facts.hidden_size * size + 4)  # the last norm
    first: Mapping[str, ModuleFact] = layers[max(0, lowest)] if layers else {}
    rotated = {first[name].name for name in ("q_proj", "k_proj") if name in first}
    if len(layers) > lowest + 1 or rotated.intersection(held.targets):
        width = _head_width(facts, first)
        total += 2 * tokens * width * size  # of the rotary embedding, once for all layers
    # the head: a gradient a learnt token, its id, and where its state stands
    return total + step.learnt() * (facts.hidden_size * size + 16)


def logits_bytes(facts: ModelFacts, step: Step) -> int:
    """Logits and probabilities of one chunk of learnt tokens, float32, and once more in the type of the weights."""
    numbers = min(step.learnt(), logits_chunk(step.device)) * facts.vocab_size
    return numbers * (8 if step.dtype == "float32" else 10)


def backward_bytes(facts: ModelFacts, held: Held, step: Step) -> int:
    """The most that the backward pass of one layer needs beside what is kept."""
    size, tokens = BYTES[step.dtype], step.tokens
    widest = max((max(m.shape) for m in facts.linear()), default=0)
    # of the MLP: the gradients of its product, of gate and of up, and the activation computed again; of the residual
    # stream: the gradient, and once more in float32 in the norm
    working = tokens * (4 * widest * size + facts.hidden_size * (size + 8))
    if held.quantized:
        working += max((m.shape[0] * m.shape[1] for m in facts.linear()), default=0) * (size + 4)
    return working


def optimizer_bytes(trained: int, name: str) -> int:
    """Bytes of what it keeps beside so many bytes of float32 that are trained."""
    name = name.removeprefix("paged_")
    states = next((count for kind, count in _STATES.items() if name.startswith(kind)), 2)
    numbers = trained // 4 * states
    return numbers if "8bit" in name else numbers // 2 if "4bit" in name else 4 * numbers


# A search asks about one model a thousand times.
@lru_cache(maxsize=4)
def layers_of(facts: ModelFacts) -> tuple[Mapping[str, ModuleFact], ...]:
    """The linear modules of each layer, by the last part of their names."""
    found: dict[str, dict[str, ModuleFact]] = {name: {} for name in layer_names(facts)}
    for module in facts.linear():
        found[layer_of(module.name)][module.name.rpartition(".")[2]] = module
    return tuple(found.values())


@lru_cache(maxsize=4)
def layer_names(facts: ModelFacts) -> tuple[str, ...]:
    """The layers that have linear modules, from the first."""
    return tuple(dict.fromkeys(layer_of(module.name) for module in facts.linear()))


@lru_cache(maxsize=4096)
def layer_of(module: str) -> str:
    """Name of the layer that a module stands in: all up to the first number, or all of it where there is none."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


@lru_cache(maxsize=64)
def lowest_learning(facts: ModelFacts, targets: tuple[str, ...]) -> int:
    """Number of the first layer that has anything to learn: no gradient flows below it, and nothing is kept there. -1
    where the first layer's input learns too, as under an adapter of the embedding, or where nothing says what does."""
    numbers = {name: number for number, name in enumerate(layer_names(facts))}
    found = [numbers.get(layer_of(name), -1) for name in targets if not is_output_head(name)]
    return min(found, default=-1)


def _layers_bytes(facts: ModelFacts, held: Held, step: Step) -> tuple[int, ...]:
    """What autograd keeps of each layer, where it is not computed again."""
    return _kept_by_layer(facts, held.targets, replace(step, checkpointed=0))


# A search for the fewest layers to compute again asks for the same ones each time.
@lru_cache(maxsize=64)
def _kept_by_layer(facts: ModelFacts, learning: tuple[str, ...], step: Step) -> tuple[int, ...]:
    targets, lowest = frozenset(learning), lowest_learning(facts, learning)
    return tuple(
        _layer_bytes(facts, layer, targets, step, first=number == lowest) if number >= lowest else 0
        for number, layer in enumerate(layers_of(facts))
    )


def _layer_bytes(
    facts: ModelFacts, layer: Mapping[str, ModuleFact], targets: frozenset[str], step: Step, *, first: bool
) -> int:
    size, tokens, wide = BYTES[step.dtype], step.tokens, facts.hidden_size
    if not step.fused or not layer.keys() >= COUNTED:
        # torch's own modules: an input and an output of each linear module, and the norms' float32 copies
        kept = sum(sum(module.shape) for module in layer.values()) + (4 * 4 // size + 2) * wide
        return tokens * kept * size + _probabilities(facts, layer, step)
    has = {name: module.name in targets for name, module in layer.items()}
    attends = not first or has["q_proj"] or has["k_proj"] or has["v_proj"]
    reaches = attends or has["o_proj"]  # whether the MLP's input has a gradient
    gated = reaches or has["gate_proj"] or has["up_proj"]
    numbers = 0
    bytes_more = 0
    for kept in (not first, reaches):  # the norms: their input, and one float32 number a token
        numbers += wide if kept else 0
        bytes_more += 4 * tokens if kept else 0
    for sharing in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        if any(has[name] for name in sharing):  # one input for all adapters that read it
            numbers += layer[sharing[0]].shape[1]
    if attends:
        numbers += sum(layer[name].shape[0] for name in ("q_proj", "k_proj", "v_proj"))
        bytes_more += _probabilities(facts, layer, step)
        if step.device != "cpu":  # the output, and at most keys and values repeated for each query head
            numbers += 3 * layer["q_proj"].shape[0]
    if gated:
        numbers += layer["gate_proj"].shape[0] + layer["up_proj"].shape[0]
    return tokens * numbers * size + bytes_more


def _probabilities(facts: ModelFacts, layer: Mapping[str, ModuleFact], step: Step) -> int:
    """Of the attention within short documents, block by block."""
    if step.device != "cpu":
        return 0
    queries = layer["q_proj"].shape[0] if "q_proj" in layer else facts.hidden_size
    heads = queries // _head_width(facts, layer)
    found = 0
    for length in step.documents():
        if length <= _KEPT_DOCUMENT:
            for start in range(0, length, _BLOCK):
                end = min(start + _BLOCK, length)
                found += (end - start) * end
    return found * heads * BYTES[step.dtype]


def _head_width(facts: ModelFacts, layer: Mapping[str, ModuleFact]) -> int:
    queries = layer["q_proj"].shape[0] if "q_proj" in layer else facts.hidden_size
    return max(1, queries // facts.attention_heads) if facts.attention_heads else min(_HEAD_WIDTH, queries or 1)
