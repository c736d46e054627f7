"""Settings of a run that fit into so much memory: tried one by one with the memory and time models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from hyperion_core.config import AdapterConfig
from hyperion_core.errors import CompatibilityError, ConfigError, HyperionError, ModelError
from hyperion_core.facts import MiB, ModelFacts
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import registry

from ..config import FinetuneConfig
from ..memory import pads
from ..models.facts import model_facts
from ..models.source import resolve_source
from ..quantization.choice import quantizer_names
from .candidate import Candidate, Forecaster, described, parts
from .memory_model import PROCESS
from .recomputing_choice import fewest, recomputing
from .row_lengths import RowLengths

Target = Literal["speed", "balanced", "quality", "nearest"]

_WIDTHS = (8, 4)
_RANKS = (64, 32, 16, 8)
_PACKS = (4096, 2048, 1024, 512, 256)
_USUAL_RANK = 16
#: Keys of `training:` that put elsewhere what the device has no room for, the least trouble first.
_ELSEWHERE: dict[str, tuple[dict[str, Any], ...]] = {
    "cpu": (
        {"offload_activations": "disk"},
        {"stream_weights": True},
        {"stream_weights": True, "offload_activations": "disk"},
    ),
    "cuda": (
        {"offload_activations": "ram"},
        {"stream_weights": True},
        {"stream_weights": True, "offload_activations": "ram"},
    ),
}


@dataclass(frozen=True)
class Found:
    """The candidate that was chosen, and the best of each way to hold the base that fits, the chosen one first."""

    chosen: Candidate
    alternatives: tuple[Candidate, ...]


def search(
    config: FinetuneConfig,
    memory: int,
    device: str,
    target: Target = "balanced",
    *,
    process: int | None = None,
    lengths: RowLengths | None = None,
) -> Found:
    """The best settings that fit.

    Args:
        memory: bytes of the device.
        target: "speed" takes the fastest, "quality" the most bits, then the highest rank; "balanced" the fastest of
            those with a rank of at least 16, where one fits; "nearest" the fastest of those that change least of what
            is learnt: the base held as the config says, then its rank.
        process: bytes of `memory` that the process itself takes; None is what it usually does.
        lengths: of the rows, where the data is read already.

    Raises:
        ModelError: nothing is known of the base model.
        ConfigError: a run of the config is refused, however it is set.
        CompatibilityError: nothing fits.
    """
    process = PROCESS[device] if process is None else process
    every = candidates(config, device, memory, process, lengths)
    for moved in _ELSEWHERE.get(device, ()):
        if any(each.fits(memory) for each in every):
            break  # what is moved is waited for in every step
        with suppress(ConfigError, CompatibilityError):  # not with this run
            asked = config.replace(training={**config.training.given(), **moved})
            every += candidates(asked, device, memory, process, lengths)
    fitting = sorted((each for each in every if each.fits(memory)), key=lambda each: _order(each, target, config))
    if not fitting:
        least = min(every, key=lambda each: each.peak)
        raise CompatibilityError(
            f"{config.base_model} does not train in {memory / MiB:,.0f} MiB, in any of the settings that are tried",
            why=f"the least of {len(every)} settings takes {(least.peak + least.process) / MiB:,.0f} MiB: "
            f"{described(least)}; {parts(least.memory)}",
            fix="give it more memory, or choose a smaller base model, a shorter max_length, or fewer bits than 4",
        )
    best: dict[tuple[str, int], Candidate] = {}
    for each in fitting:
        best.setdefault((each.method, each.bits), each)
    return Found(fitting[0], tuple(best.values()))


def candidates(
    config: FinetuneConfig, device: str, memory: int, process: int, lengths: RowLengths | None = None
) -> list[Candidate]:
    """Every set of settings that a run would start with, with no layer, all layers, and as few as fit computed again.

    Args:
        memory: bytes of the device, of which the process itself takes `process`.
        lengths: of the rows, where the data is read already.

    Raises:
        ModelError: nothing is known of the base model.
        ConfigError, CompatibilityError: a run of the config is refused, however it is set.
    """
    source = resolve_source(config.base_model, config.revision, config.base_dir)
    facts = _one_of_equals(model_facts(source))
    if not facts.known:
        raise ModelError(
            f"nothing is known of {config.base_model}",
            why=facts.why_unknown,
            fix="give a folder that holds its config.json: no weights are needed to plan",
        )
    ranks = (
        [None]
        if "r" not in type(config.adapter).model_fields
        else sorted({*_RANKS, getattr(config.adapter, "r")}, reverse=True)  # noqa: B009
    )
    found: list[Candidate] = []
    refusals: list[ConfigError | CompatibilityError] = []
    for quantization in _quantizations(config, device):
        for rank in ranks:
            try:
                asked = config.replace(quantization=quantization, adapter=_of_rank(config.adapter, rank))
                made = Forecaster(asked, source, facts, device, process, lengths)
            except (ConfigError, CompatibilityError) as error:
                refusals.append(error)  # these do not go together: no choice
                continue
            found += _computed(made, memory)
    if not found:
        raise refusals[0]
    return found


def _of_rank(adapter: AdapterConfig, rank: int | None) -> dict[str, Any]:
    """Its keys with another rank, and with as much weight as before what it has learnt: alpha goes with the rank, or
    with its root where the adapter scales by that (rsLoRA)."""
    given = {**adapter.given(), "type": adapter.type}
    before, alpha = getattr(adapter, "r", None), getattr(adapter, "lora_alpha", None)
    if rank is None or before is None:
        return given
    if alpha is not None and rank != before:
        times = rank / before
        given["lora_alpha"] = max(
            1, round(alpha * (math.sqrt(times) if getattr(adapter, "use_rslora", False) else times))
        )
    return {**given, "r": rank}


# What is reckoned of a model is kept by its facts, which are compared in no time where they are the same object.
@lru_cache(maxsize=4)
def _one_of_equals(facts: ModelFacts) -> ModelFacts:
    return facts


def _quantizations(config: FinetuneConfig, device: str) -> list[dict[str, Any] | None]:
    """Ways to hold the base: what the config says, plainly, and what each installed quantizer can do without data."""
    found: list[dict[str, Any] | None] = [None]
    if config.quantization is not None:
        if config.quantization.bits == "auto" or config.quantization.bit_plan:
            return [config.quantization.given()]
        found.insert(0, config.quantization.given())
    said = config.quantization.method if config.quantization else None
    for name in quantizer_names():
        try:
            plugin = registry().load("quantizer", name)
        except HyperionError:
            continue  # an installed quantizer that does not load is no choice; `plugins doctor` says why
        assert issubclass(plugin, Quantizer)
        provides = plugin.provides
        if provides.trainable and not provides.calibration and device in provides.devices and name != said:
            found += [{"method": name, "bits": width} for width in _WIDTHS if width in provides.bits]
    return found


def _computed(made: Forecaster, memory: int) -> Iterator[Candidate]:
    """The same run, in passes of different sizes, with more or fewer layers computed again."""
    training, layers = made.config.training, made.facts.layers
    for size in _sizes(made):

        def candidate(again: int, size: dict[str, int] = size) -> Candidate:
            return made.candidate({**recomputing(training, None if 0 < again == layers else again), **size})

        needed = fewest(layers, lambda again, candidate=candidate: candidate(again).fits(memory))  # type: ignore[misc]
        yield from (candidate(again) for again in sorted({0, needed, layers}))


def _sizes(made: Forecaster) -> list[dict[str, int]]:
    """Of a pass, as keys of `training:` that do not change what is learnt: packs, or batches where rows are padded."""
    training = made.config.training
    if not pads(training):
        packs = {max(made.length, tokens) for tokens in (*_PACKS, training.pack_length or 0, made.length)}
        if made.lengths:  # more would be no larger a pass
            packs = {min(made.lengths.together, tokens) for tokens in packs}
        return [{"pack_length": tokens} for tokens in sorted(packs, reverse=True)]
    rows = training.per_device_train_batch_size
    whole, sizes = rows * training.gradient_accumulation_steps, [rows]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return [{"per_device_train_batch_size": size, "gradient_accumulation_steps": whole // size} for size in sizes]


def _order(candidate: Candidate, target: Target, asked: FinetuneConfig) -> tuple[float, ...]:
    rank = candidate.rank or 0
    # a padded batch is made smaller where that is needed only; a pack computes its rows as fast when it is smaller
    least = -candidate.step.tokens if pads(candidate.config.training) else candidate.peak
    if target == "speed":
        return candidate.operations, -candidate.bits, -rank, least
    if target == "quality":
        return -candidate.bits, -rank, candidate.operations, least
    if target == "nearest":
        said, now = (each.quantization.given() if each.quantization else {} for each in (asked, candidate.config))
        moved = abs(rank - getattr(asked.adapter, "r", rank))
        return said != now, -candidate.bits, moved, candidate.operations, least
    return -min(rank, _USUAL_RANK), candidate.operations, -candidate.bits, -rank, least
