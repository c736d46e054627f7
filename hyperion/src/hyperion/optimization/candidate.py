"""One set of settings of a run, and what they take. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from hyperion_core.errors import Problem
from hyperion_core.facts import BitPlan, Cost, MiB, ModelFacts, Workload

from ..config import FinetuneConfig
from ..memory import adapter_cost, forecast, pads, planned_step, with_new_rows
from ..models.hardware import choose_dtype
from ..models.source import BaseModelSource
from ..planning import effective_max_length
from ..planning_hooks import PlanningHooks
from ..quantization.planning import planned_bits, quantized_cost
from ..settling import check_adapter, settle
from ..training_checks import device_problems, layer_problems, length_problems, streaming_problems
from ..training_config import TrainingConfig
from .memory_model import Held, Step
from .row_lengths import RowLengths
from .time_model import step_operations

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_MOVED = ("offload_activations", "stream_weights")


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

    def lines(self, asked: FinetuneConfig) -> dict[str, Any]:
        """The keys that make it so, laid over those of the config that was `asked` for."""
        adapter = {**self.config.adapter.given(), "type": self.config.adapter.type}
        training = self.config.training
        sized = _BATCH if pads(training) else ("pack_length",)
        chosen = {
            name: said
            for name in (*sized, "recompute_layers", "gradient_checkpointing")
            if (said := getattr(training, name, None)) is not None
        }
        chosen |= {name: said for name in _MOVED if (said := getattr(training, name)) != getattr(asked.training, name)}
        held: dict[str, Any] = {}
        if self.config.quantization:
            held = {"quantization": {**self.config.quantization.given(), "method": self.method}}
        elif asked.quantization:
            held = {"quantization": None}
        return {"adapter": adapter, **held, "training": chosen}

    def fits(self, memory: int) -> bool:
        return self.peak + self.process <= memory


class Forecaster:
    """What a run of a config takes: of one that is settled as the run would settle it.

    Args:
        config: what is asked for.
        source, facts: of its base, which is known.
        process: bytes of the device that are taken before the run.
        lengths: of the rows, where the data is read already; else each is as long as it may be.

    Raises:
        ConfigError, CompatibilityError: the run would be refused.
    """

    def __init__(
        self, config: FinetuneConfig, source: BaseModelSource, facts: ModelFacts, device: str, process: int = 0,
        lengths: RowLengths | None = None,
    ) -> None:  # fmt: skip
        problems: list[Problem] = []
        settled = settle(config, source, facts, problems)
        self.config, hooks = settled.config, PlanningHooks(settled.hooks)
        self.facts, self.device, self.process, self.lengths = facts, device, process, lengths
        self.length = lengths.longest if lengths else effective_max_length(self.config, facts)
        self.dtype = choose_dtype(self.config.dtype, device)
        quantization, training = self.config.quantization, self.config.training
        check_adapter(self.config, hooks, facts, problems)
        bits = planned_bits(
            quantization, self.config.base_dir, hooks, facts, settled.saved, device, self.dtype, problems
        )
        found = length_problems(training, facts) + layer_problems(training, facts) + device_problems(training, device)
        found += streaming_problems(training, facts, quantization, device, self.dtype)
        problems += [problem.at("training") for problem in found]
        self.config.refuse(problems)
        self._adapter = hooks.adapter(self.config.adapter.type)
        targets = self._adapter.adapter_targets(config=self.config.adapter, model=facts)
        self._targets = with_new_rows(self.config, facts, targets)
        self._estimate = cache(self._adapter_estimate)
        self._quantized, self._bits, self._method = None, 16, ""
        if quantization is not None and bits is not None:
            self._quantized = quantized_cost(quantization, hooks, facts, bits, self.dtype)
            self._bits, self._method = _widest(bits.assumed), str(quantization.method)

    def candidate(self, training: Mapping[str, Any]) -> Candidate:
        """With other keys in `training:`."""
        config = self.config.model_copy(update={"training": TrainingConfig.parse(training)})
        facts, targets, said = self.facts, self._targets, config.training
        step = planned_step(said, facts, self.length, self.dtype, self.device)
        if self.lengths:
            step = self.lengths.within(step, said)
        cost = adapter_cost(self._estimate, config, facts, step, targets)
        memory = forecast(facts, cost, self._quantized, step, said.optim, targets, streams=said.stream_weights)
        held = Held(memory["weights"], cost.memory.get("adapter", 0) // 4, targets, self._quantized is not None)
        rows = said.per_device_train_batch_size * said.gradient_accumulation_steps
        operations = step_operations(facts, held, step, rows * self.length)
        rank = getattr(config.adapter, "r", None)
        return Candidate(
            config, self._bits, self._method, rank, step, memory, self.process, operations, facts.hidden_size
        )

    def _adapter_estimate(self, work: Workload) -> Cost:
        return self._adapter.adapter_estimate(config=self.config.adapter, model=self.facts, work=work)


def parts(memory: Mapping[str, int]) -> str:
    """Bytes by part, in MiB."""
    return ", ".join(f"{part} {size / MiB:,.0f}" for part, size in memory.items())


def described(candidate: Candidate) -> str:
    """In a few words."""
    held = f"{candidate.method}, {candidate.bits} bits" if candidate.method else "not quantized"
    rank = f"rank {candidate.rank}, " if candidate.rank else ""
    again = f", {candidate.step.checkpointed} layers computed again" if candidate.step.checkpointed else ""
    said = candidate.config.training
    away = {"disk": ", activations on disk", "ram": ", activations in RAM"}.get(said.offload_activations or "", "")
    away += ", weights streamed" if said.stream_weights else ""
    return f"{held}, {rank}{candidate.step.tokens} tokens a pass{again}{away}"


def _widest(plan: BitPlan) -> int:
    """Bits of the modules that have the most, of those that are quantized."""
    widths = {bits for bits, _ in plan.overrides.values()} - {16}
    return max(widths, default=plan.bits)
