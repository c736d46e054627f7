"""What hooks tell each other: plain data, free of torch, so that planning needs no heavy import."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

MiB = 2**20


# --- the base model -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModuleFact:
    """One module that owns weights. `shape` is the weight's: (out, in) for `linear`, (rows, width) for `embedding`."""

    name: str
    kind: Literal["linear", "embedding", "norm", "other"]
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count + (self.shape[0] if self.bias else 0)


@dataclass(frozen=True)
class ModelFacts:
    """A model's architecture, known without its weights.

    `modules` is empty when nothing is known (the model is not local): ask `known` first. `stored` is the number format
    of the weights' files, "" where that is not said. It can stand for what is reckoned from it, as a key: the hash of
    its thousands of modules is taken once.
    """

    source: str
    model_type: str = ""
    modules: tuple[ModuleFact, ...] = ()
    hidden_size: int = 0
    layers: int = 0
    vocab_size: int = 0
    context_length: int = 0
    tied_embeddings: bool = False
    why_unknown: str = ""
    attention_heads: int = 0
    stored: str = ""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.source, self.modules))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: another process hashes otherwise."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def _linear(self) -> tuple[ModuleFact, ...]:
        return tuple(m for m in self.modules if m.kind == "linear" and not is_output_head(m.name))

    @property
    def known(self) -> bool:
        return bool(self.modules)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied weights count once."""
        return sum(module.parameters for module in self.modules)

    def linear(self) -> tuple[ModuleFact, ...]:
        """The linear modules of the layers; the output head is none of them."""
        return self._linear

    def matching(self, targets: str | Iterable[str]) -> tuple[ModuleFact, ...]:
        """Modules named by `targets`, by PEFT's rule: a string is a regular expression over the whole name,
        a list holds names or last parts of names; "all-linear" is every linear module but the output head."""
        if targets == "all-linear":
            return self.linear()
        if isinstance(targets, str):
            return tuple(m for m in self.modules if re.fullmatch(targets, m.name))
        wanted = tuple(targets)
        return tuple(m for m in self.modules if any(m.name == t or m.name.endswith(f".{t}") for t in wanted))

    def short_names(self, kind: str = "linear") -> tuple[str, ...]:
        """Last parts of module names of a kind, in order of appearance: what `target_modules` may hold."""
        return tuple(dict.fromkeys(m.name.rpartition(".")[2] for m in self.modules if m.kind == kind))


def is_output_head(name: str) -> bool:
    """Whether a module is the model's output projection, by the names that transformers uses."""
    return name.rpartition(".")[2] in {"lm_head", "embed_out", "output_projection"}


# --- work and cost ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workload:
    """One training step on one device. `length` is tokens a row; `dtype` is the base weights'."""

    batch: int
    length: int
    packing: bool = False
    dtype: str = "float32"
    checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """What something costs. `memory` is bytes by part ("weights", "adapter", "gradients", "optimizer",
    "activations", "logits"), `tier` the memory that holds each part ("device" unless named), `disk` is bytes,
    `flops` are floating point operations a token, forward and backward."""

    memory: Mapping[str, int] = field(default_factory=dict)
    tier: Mapping[str, Literal["device", "ram", "disk"]] = field(default_factory=dict)
    disk: int = 0
    flops: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def __add__(self, other: Cost) -> Cost:
        memory = dict(self.memory)
        for part, size in other.memory.items():
            memory[part] = memory.get(part, 0) + size
        return Cost(memory, {**self.tier, **other.tier}, self.disk + other.disk, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run and the devices under them."""

    size: int = 1
    nodes: int = 1
    device: str = "cpu"


# --- adapters -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Settings for what a config leaves out: `options` of the adapter's own, and keys of `training:` to go with them
    under AdamW. `basis` says in a few words where they come from; the plan shows it."""

    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an adapter can do, and what it needs of the base's modules.

    `needs`: "forward" (only calls the module) and "dequantize" (needs its weight in full precision).
    A capability asks for its hooks: `per_token` for `adapter_route`, `mergeable` for `adapter_merge_weight`,
    `combinable` for `adapter_combine`. `new_tokens`: it trains the embedding rows `ctx.new_token_ids`, declares them
    in `adapter_param_groups`, and saves and loads them; a run that adds tokens takes no other adapter.
    """

    per_token: bool = False
    mergeable: bool = False
    combinable: bool = False
    new_tokens: bool = False
    needs: frozenset[str] = frozenset({"forward"})


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Trainable parameters that share settings. `lr_ratio` multiplies the run's learning rate; `weight_decay`
    None keeps the run's."""

    name: str
    parameters: tuple[tuple[str, Any], ...]
    lr_ratio: float = 1.0
    weight_decay: float | None = None


# --- quantizers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Provides:
    """What a quantizer can do. `dequantize`: it hands out full-precision weights; `calibration`: it wants data;
    `reads`: what `quantization_config.quant_method` says in checkpoints that it loads."""

    bits: frozenset[int] = frozenset()
    per_module: bool = False
    trainable: bool = False
    devices: frozenset[str] = frozenset()
    dequantize: bool = False
    calibration: bool = False
    reads: frozenset[str] = frozenset()

    def offers(self) -> frozenset[str]:
        """The needs of an adapter that a base so quantized can meet."""
        return frozenset({"forward", "dequantize"} if self.dequantize else {"forward"})


@dataclass(frozen=True, slots=True)
class BitPlan:
    """Bits and group size of every linear module but the output head: a default, and overrides by module-name pattern
    (fnmatch; the first that matches wins). Group size 0 is the method's own; 16 bits leave a module as it is."""

    bits: int
    group_size: int
    overrides: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, module: str) -> tuple[int, int]:
        """(bits, group size) of one module."""
        for pattern, chosen in self.overrides.items():
            if fnmatch.fnmatchcase(module, pattern):
                return chosen
        return self.bits, self.group_size


@dataclass(frozen=True, slots=True)
class QuantInfo:
    """What is really in force in one module: bits, group size and resident bytes, scales and zeros counted."""

    bits: int
    group_size: int
    nbytes: int


# --- schedulers, data, objectives ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Horizon:
    """The optimizer steps of one parameter group: `total`, of which the first `warmup` rise from 0."""

    total: int
    warmup: int = 0


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What a curriculum may know of the rows without a model: `lengths` in tokens, (N,)."""

    lengths: Any
    texts: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a sequence: `text`, and whether the model is to learn it."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    """What is fed to the model from one row. `role` tells several sequences of a row apart ("chosen", "rejected").

    `messages`, when there are any, replace `segments`, and go through the tokenizer's chat template.
    """

    segments: tuple[Segment, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    role: str = "only"


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the N supervised tokens of a batch come from: tensors (N,) of sequence index and token id, and each
    sequence's role."""

    sequence: Any
    token: Any
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of the logits at the positions that predict the N supervised tokens, float32 with gradient: `logsumexp` (N,) is
    log Σ exp(logits); `mean_logit()` gives the mean over the vocabulary, (N,). So the log-probabilities of all words
    have the mean `mean_logit() - logsumexp`."""

    logsumexp: Any
    mean_logit: Callable[[], Any]


# --- strategies, deployment, evaluation, guards -------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """How to start a run: one command line and environment a process."""

    processes: tuple[tuple[str, ...], ...]
    environment: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class InForce:
    """What a run measured of itself, to be held against its plan."""

    strategy: str
    world: int
    shards: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackageFacts:
    """A packaged model: its folder, format, and the files in it with their bytes."""

    folder: Path
    format: str
    files: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileRef:
    """A large file of a rendered deployment, by reference."""

    path: Path


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployed model: where it is and how it is doing."""

    id: str
    url: str
    state: Literal["pending", "running", "failed", "deleted"]


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of a benchmark or a guard. `stderr` is the standard error where it is known."""

    task: str
    metric: str
    value: float
    samples: int
    stderr: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a guard says of one text or row."""

    allowed: bool
    reason: str = ""
    score: float | None = None
