"""`quality: auto`: what a config leaves out, set as the adapter's plugin recommends. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from hyperion_core.errors import ConfigError, PluginHookError, Problem
from hyperion_core.facts import ModelFacts, Recommendation
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import registry

from .planning_hooks import PlanningHooks
from .training_config import TrainingConfig

if TYPE_CHECKING:
    from .config import FinetuneConfig


def with_preset(
    config: FinetuneConfig, hooks: PlanningHooks, facts: ModelFacts, problems: list[Problem]
) -> tuple[FinetuneConfig, str]:
    """The config with the preset's values where it says nothing, and a line for the plan: "" without a preset.

    Raises:
        PluginHookError: what the plugin recommends does not fit its own options, or the config.
    """
    if config.quality is None:
        return config, ""
    name = config.adapter.type
    method = config.quantization.method if config.quantization else None
    quantizer = cast(Quantizer, hooks.plugin("quantizer", method)) if method else None
    found: Recommendation | None = hooks.adapter(name).adapter_recommend(
        config=config.adapter, model=facts, quantizer=quantizer.provides if quantizer else None
    )
    if found is None:
        why = f'the adapter "{name}" recommends no settings, so there is nothing to fill in'
        problems.append(Problem("quality", "quality: auto does nothing", why, "leave it out, or take another adapter"))
        return config, ""
    options = {key: value for key, value in found.options.items() if key not in config.adapter.model_fields_set}
    training = _training(config.training, found.training)
    try:
        filled = config.replace(
            adapter={**config.adapter.given(), "type": name, **options},
            training={**config.training.given(), **training},
        )
    except ConfigError as error:
        raise PluginHookError(
            f'the adapter "{name}" of {registry().find("adapter", name).whose} failed in adapter_recommend',
            why="what it recommends is refused: " + "; ".join(map(str, error.problems)),
            fix="it is the plugin's fault: tell its authors, or leave quality out",
        ) from error
    return filled, _described({**options, **training}, found.basis)


def _training(training: TrainingConfig, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Of the recommended keys those that say nothing against what is given. They are for one kind of optimizer."""
    given = training.given()
    if given.get("optim") and _kind(given["optim"]) != _kind(recommended.get("optim")):
        return {}
    return {
        key: value for key, value in recommended.items() if key not in given and not _stands_against(key, value, given)
    }


def _kind(optim: str | None) -> str:
    """AdamW's variants are one kind."""
    return "adamw" if "adamw" in (optim or "adamw") else str(optim)


def _stands_against(key: str, value: Any, given: Mapping[str, Any]) -> bool:
    """Whether the key says again, or otherwise, what another one says: warmup_ratio beside warmup_steps."""
    return len(TrainingConfig.contradictions({**given, key: value})) > len(TrainingConfig.contradictions(given))


def _described(filled: Mapping[str, Any], basis: str) -> str:
    if not filled:
        return "auto, and all that it would set is given"
    values = ", ".join(f"{key}: {_shown(value)}" for key, value in filled.items())
    return f"auto sets {values}" + (f" ({basis})" if basis else "")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
