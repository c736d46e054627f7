"""Settings of a run that fit into so much memory: tried one by one with the memory and time models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hyperion_core.errors import CompatibilityError, ConfigError, HyperionError, ModelError
from hyperion_core.facts import MiB, ModelFacts, Workload
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import registry

from ..config import FinetuneConfig
from ..memory import forecast, planned_step
from ..models.facts import model_facts
from ..models.hardware import choose_dtype
from ..models.source import resolve_source
from ..planning import choose_plugins, effective_max_length
from ..planning_hooks import PlanningHooks
from ..quantization.choice import quantizer_names
from ..quantization.planning import PlannedBits, quantized_cost, uniform_bits
from .memory_model import PROCESS, Held, Step
from .recomputing_choice import fewest
from .time_model import step_operations

Target = Literal["speed", "balanced", "quality"]

_WIDTHS = (8, 4)
_RANKS = (64, 32, 16, 8)
_PACKS = (4096, 2048, 1024, 512, 256)
_USUAL_RANK = 16


@dataclass(frozen=True)
class Candidate:
    """One set of settings. `memory` is peak bytes by part, `process` what is there before it, both on the device;
    `operations` are floating point operations an optimizer step; `bits` 16 is not quantized."""

    config: FinetuneConfig
    bits: int
    method: str
    rank: int | None
    step: Step
    memory: dict[str, int]
    process: int
    operations: float
    width: int

    @cached_property
    def peak(self) -> int:
        """Bytes, without the process itself."""
        return sum(self.memory.values())

    def lines(self) -> dict[str, Any]:
        """The keys of the config that make it so."""
        adapter = {**self.config.adapter.given(), "type": self.config.adapter.type}
        training = self.config.training
        chosen = {
            name: said
            for name in ("pack_length", "recompute_layers", "gradient_checkpointing")
            if (said := getattr(training, name, None)) is not None
        }
        held = (
            {"quantization": {**self.config.quantization.given(), "method": self.method}}
            if self.config.quantization
            else {}
        )
        return {"adapter": adapter, **held, "training": chosen}

    def fits(self, memory: int) -> bool:
        return self.peak + self.process <= memory


@dataclass(frozen=True)
class Found:
    """The candidate that was chosen, and the best of each way to hold the base that fits, the chosen one first."""

    chosen: Candidate
    alternatives: tuple[Candidate, ...]


def search(
    config: FinetuneConfig, memory: int, device: str, target: Target = "balanced", *, process: int | None = None
) -> Found:
    """The best settings that fit.

    Args:
        memory: bytes of the device.
        target: "speed" takes the fastest, "quality" the most bits, then the highest rank; "balanced" the fastest of
            those with a rank of at least 16, where one fits.
        process: bytes of `memory` that the process itself takes; None is what it usually does.

    Raises:
        ModelError: nothing is known of the base model.
        CompatibilityError: nothing fits.
    """
    process = PROCESS[device] if process is None else process
    every = candidates(config, device, memory, process)
    fitting = sorted((each for each in every if each.fits(memory)), key=lambda each: _order(each, target))
    if not fitting:
        least = min(every, key=lambda each: each.peak)
        raise CompatibilityError(
            f"{config.base_model} does not train in {memory / MiB:,.0f} MiB, however it is set",
            why=f"the least of {len(every)} settings takes {(least.peak + least.process) / MiB:,.0f} MiB: "
            f"{described(least)}; {parts(least)}",
            fix="give it more memory, choose a smaller base model or a shorter max_length, or set "
            "training.stream_weights (CPU)",
        )
    best: dict[tuple[str, int], Candidate] = {}
    for each in fitting:
        best.setdefault((each.method, each.bits), each)
    return Found(fitting[0], tuple(best.values()))


def candidates(config: FinetuneConfig, device: str, memory: int, process: int) -> list[Candidate]:
    """Every set of settings that is possible, with no layer, all layers, and as few as fit computed again.

    Args:
        memory: bytes of the device, of which the process itself takes `process`.

    Raises:
        ModelError: nothing is known of the base model.
    """
    source = resolve_source(config.base_model, config.revision, config.base_dir)
    facts = model_facts(source)
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
    for quantization in _quantizations(config, device):
        for rank in ranks:
            found += _with(config, facts, quantization, rank, device, memory, process)
    return found


def parts(candidate: Candidate) -> str:
    return ", ".join(f"{name} {size / MiB:,.0f}" for name, size in candidate.memory.items())


def described(candidate: Candidate) -> str:
    """In a few words."""
    held = f"{candidate.method}, {candidate.bits} bits" if candidate.method else "not quantized"
    rank = f"rank {candidate.rank}, " if candidate.rank else ""
    again = f", {candidate.step.checkpointed} layers computed again" if candidate.step.checkpointed else ""
    return f"{held}, {rank}{candidate.step.tokens} tokens a pass{again}"


def _quantizations(config: FinetuneConfig, device: str) -> list[dict[str, Any] | None]:
    """Ways to hold the base: what the config says, plainly, and what each installed quantizer can do without data."""
    found: list[dict[str, Any] | None] = [None]
    if config.quantization is not None:
        if config.quantization.bits == "auto" or config.quantization.bit_plan:
            return [config.quantization.given()]
        found.append(config.quantization.given())
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


def _with(
    config: FinetuneConfig,
    facts: ModelFacts,
    quantization: dict[str, Any] | None,
    rank: int | None,
    device: str,
    size: int,
    process: int,
) -> list[Candidate]:
    adapter = config.adapter.given() if rank is None else {**config.adapter.given(), "r": rank}
    adapter = {**adapter, "type": config.adapter.type}
    try:
        base = config.replace(quantization=quantization, adapter=adapter)
        hooks = PlanningHooks(choose_plugins(base)[0])
        driver = hooks.adapter(base.adapter.type)
        dtype = choose_dtype(base.dtype, device)
        length = effective_max_length(base, facts)
        cost = driver.adapter_estimate(config=base.adapter, model=facts, work=Workload(1, length, True, dtype))
        targets = tuple(driver.adapter_targets(config=base.adapter, model=facts))
        held_as = None
        if base.quantization is not None:
            bits = _bits(base)
            checked = hooks.quantizer(str(base.quantization.method)).quantizer_check(
                config=base.quantization, model=facts, bits=bits.assumed, device=device
            )
            if checked:
                return []
            held_as = quantized_cost(base.quantization, hooks, facts, bits, dtype)
    except (ConfigError, CompatibilityError):
        return []  # the two do not go together: no choice
    width = base.quantization.bits if base.quantization and isinstance(base.quantization.bits, int) else 16
    method = str(base.quantization.method) if base.quantization else ""
    found = []
    for pack in sorted({max(length, tokens) for tokens in _PACKS}, reverse=True):

        def candidate(again: int, pack: int = pack) -> Candidate:
            tried = base.replace(training=_training(base, facts, pack, again))
            step = planned_step(tried.training, facts, length, dtype, device)
            memory = forecast(facts, cost, held_as, step, tried.training.optim, targets,
                              streams=tried.training.stream_weights)  # fmt: skip
            held = Held(memory["weights"], cost.memory.get("adapter", 0) // 4, targets, held_as is not None)
            rows = tried.training.per_device_train_batch_size * tried.training.gradient_accumulation_steps
            operations = step_operations(facts, held, step, rows * length)
            return Candidate(tried, width, method, rank, step, memory, process, operations, facts.hidden_size)

        needed = fewest(facts.layers, lambda again, candidate=candidate: candidate(again).fits(size))  # type: ignore[misc]
        found += [candidate(again) for again in sorted({0, needed, facts.layers})]
    return found


def _training(config: FinetuneConfig, facts: ModelFacts, pack: int, again: int) -> dict[str, Any]:
    given = {**config.training.given(), "pack_length": pack}
    for name in ("recompute_layers", "gradient_checkpointing", "activation_checkpointing"):
        given.pop(name, None)
    some = 0 < again < facts.layers
    return {**given, **({"recompute_layers": again} if some else {"gradient_checkpointing": again > 0})}


def _bits(config: FinetuneConfig) -> PlannedBits:
    assert config.quantization is not None
    if isinstance(config.quantization.bits, int) and not config.quantization.bit_plan:
        plan = uniform_bits(config.quantization)
        return PlannedBits(plan, plan)
    raise ConfigError([])


def _order(candidate: Candidate, target: Target) -> tuple[float, ...]:
    rank = candidate.rank or 0
    if target == "speed":
        return candidate.operations, -candidate.bits, -rank, candidate.peak
    if target == "quality":
        return -candidate.bits, -rank, candidate.operations, candidate.peak
    return -min(rank, _USUAL_RANK), candidate.operations, -candidate.bits, -rank, candidate.peak
