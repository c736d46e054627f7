"""`AdapterOptimizer`: a config for a model and so much memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperion_core.errors import ConfigError, Problem
from hyperion_core.facts import MiB

from ..config import FinetuneConfig
from .candidate import Candidate
from .search import search

_TARGETS = ("balanced", "speed", "quality")


@dataclass(frozen=True)
class Precision:
    """How the base is held: `bits` a weight, 16 where it is not quantized, and the quantizer's name or ""."""

    bits: int
    method: str


@dataclass(frozen=True)
class OptimizedConfig:
    """Settings that fit. `config` is for `hyperion.Trainer`; `forecast` says what they take."""

    config: FinetuneConfig
    quantization: Precision
    forecast: Candidate

    @property
    def adapter(self) -> Any:
        """The adapter's own config; LoRA's has `r`."""
        return self.config.adapter

    @property
    def training(self) -> Any:
        return self.config.training


class AdapterOptimizer:
    """Chooses quantization, rank, pack length and checkpointing of a LoRA run. Loads no weights, imports no torch.

    Args:
        base_model: a folder or a hub id that is cached; its config.json is enough.
        target_gpu_memory: MiB of the GPU.
        performance_target: "speed", "balanced" or "quality".

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(self, base_model: str, target_gpu_memory: float, performance_target: str = "balanced") -> None:
        problems = []
        if isinstance(target_gpu_memory, bool) or not isinstance(target_gpu_memory, (int, float)):
            problems.append(_problem("target_gpu_memory", f"{target_gpu_memory!r} is no number", "24 * 1024 is 24 GiB"))
        elif not 0 < target_gpu_memory < float("inf"):
            problems.append(_problem("target_gpu_memory", f"{target_gpu_memory} MiB is no memory", "24 * 1024"))
        if performance_target not in _TARGETS:
            names = ", ".join(_TARGETS)
            problems.append(_problem("performance_target", f"{performance_target!r} is unknown", f"one of {names}"))
        if problems:
            raise ConfigError(problems, source="AdapterOptimizer")
        self.base_model = base_model
        self.memory = int(target_gpu_memory * MiB)
        self.performance_target = performance_target

    def generate_config(self) -> OptimizedConfig:
        """The best settings that fit.

        Raises:
            ModelError: nothing is known of the base model.
            CompatibilityError: nothing fits.
        """
        asked = FinetuneConfig.parse({"base_model": self.base_model, "adapter": {"type": "lora"}})
        chosen = search(asked, self.memory, "cuda", self.performance_target).chosen  # type: ignore[arg-type]
        return OptimizedConfig(chosen.config, Precision(chosen.bits, chosen.method), chosen)


def _problem(where: str, what: str, fix: str) -> Problem:
    return Problem(where, what, "settings are sought for it", fix)
