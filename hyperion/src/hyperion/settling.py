"""What a config is a run of: its plugins, and what its base and `quality: auto` fill in. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hyperion_core.compatibility import check_pair
from hyperion_core.errors import Problem
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Adapter, Quantizer
from hyperion_core.plan import Choice
from hyperion_core.registry import registry

from .config import FinetuneConfig
from .models.source import BaseModelSource
from .planning_hooks import PlanningHooks
from .preset import with_preset
from .quantization.planning import with_checkpoint


@dataclass(frozen=True)
class Settled:
    """A config with what its base and its plugins bring along: what a run of it would be.

    `saved` are the bits of a base that is quantized already; `preset` is a line for the plan.
    """

    config: FinetuneConfig
    hooks: RunHooks
    choices: list[Choice]
    saved: BitPlan | None
    preset: str


def settle(
    config: FinetuneConfig, source: BaseModelSource | None, facts: ModelFacts, problems: list[Problem]
) -> Settled:
    """Choose the plugins, and fill in what a quantized base says and what `quality: auto` recommends."""
    config, saved = with_checkpoint(config, source, facts, problems)
    hooks, choices = choose_plugins(config)
    config, preset = with_preset(config, PlanningHooks(hooks), facts, problems)
    return Settled(config, hooks, choices, saved, preset)


def choose_plugins(config: FinetuneConfig) -> tuple[RunHooks, list[Choice]]:
    """Every plugin that the config names, registered for one run."""
    chosen = [
        ("adapter", config.adapter.type),
        ("objective", config.objective.type),
        ("scheduler", config.scheduler().type),
        *([("quantizer", quantizer_name(config))] if config.quantization else []),
        *(("observer", name) for name in config.plugins),
    ]
    hooks = RunHooks()
    for kind, name in chosen:
        hooks.add(registry().create(kind, name), name)
    return hooks, [Choice.of(registry().find(kind, name)) for kind, name in chosen]


def quantizer_name(config: FinetuneConfig) -> str:
    """The quantizer's name; validation has put it into the config."""
    assert config.quantization is not None and config.quantization.method is not None
    return config.quantization.method


def check_adapter(config: FinetuneConfig, hooks: PlanningHooks, facts: ModelFacts, problems: list[Problem]) -> None:
    """What stands against the adapter: its own options, the base, the quantizer, or new tokens."""
    plugin = cast(Adapter, hooks.plugin("adapter", config.adapter.type))
    quantizer = cast(Quantizer, hooks.plugin("quantizer", quantizer_name(config))) if config.quantization else None
    found = hooks.adapter(config.adapter.type).adapter_check(
        config=config.adapter, model=facts, quantizer=quantizer.provides if quantizer else None
    )
    problems += [problem.at("adapter") for problem in found or []]
    pair = check_pair(type(plugin), type(quantizer) if quantizer else None)
    if pair:
        problems.append(pair)
    if config.new_tokens and not plugin.capabilities.new_tokens:
        problems.append(
            Problem("new_tokens", f'the adapter "{config.adapter.type}" cannot train new tokens',
                    "it does not declare that capability", "choose another adapter, or leave new_tokens out")
        )  # fmt: skip
