"""What `quality: auto` sets: one table, and how it fits to what a config says already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hyperion_core.facts import ModelFacts, ModuleFact

from .config import LoraConfig

#: `benchmarks/convergence.py` measures which settings reach the loss of the usual ones soonest, and prints this table.
#: Until its results stand in benchmarks/results/convergence.md these are the literature's: PiSSA (arXiv:2404.02948),
#: LoRA+ (arXiv:2402.12354), all linear modules (QLoRA, arXiv:2305.14314).
OPTIONS: Mapping[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "init_lora_weights": "pissa",
    "loraplus_lr_ratio": 4.0,
}
TRAINING: Mapping[str, Any] = {"learning_rate": 5e-4, "warmup_ratio": 0.05}
BASIS = "from the literature"

_START = ("init_lora_weights", "init_rows")
#: The longest shorter side of a weight that is decomposed exactly: the time grows with its square, and with the longer.
_EXACT = 2048
#: Randomized (Halko et al. 2011, arXiv:0909.4061), under PEFT's name for it: its time grows with the rank instead.
_APPROXIMATE = "pissa_niter_16"


def options_for(config: LoraConfig, model: ModelFacts, *, start: bool = True, rank: bool = True) -> dict[str, Any]:
    """The table's options that `config` leaves open and that go with what it says, and with the names of the base.

    Args:
        start: with the initialisation.
        rank: with r and lora_alpha. Where the config has an r of its own, lora_alpha keeps the table's scaling.
    """
    given = config.model_fields_set
    options = {key: value for key, value in OPTIONS.items() if key not in given}
    if not start or config.lora_bias or "init_lora_weights" in given:
        options = {key: value for key, value in options.items() if key not in _START}
    targets = options.get("target_modules")
    if targets and model.known and not model.matching(targets):
        del options["target_modules"]  # another architecture's names
    elif isinstance(targets, str) and config.layers_to_transform is not None:
        del options["target_modules"]  # layers are named beside a list of modules only
    if not rank or config.rank_pattern or config.alpha_pattern:
        options = {key: value for key, value in options.items() if key not in ("r", "lora_alpha")}
    elif "lora_alpha" in options:
        options["lora_alpha"] = _same_scaling({**options, **config.given()})
    return options


def in_time(options: Mapping[str, Any], modules: Iterable[ModuleFact]) -> Mapping[str, Any]:
    """The options, with a start that does not keep the first step waiting where one of the wrapped `modules` is large.

    PiSSA (arXiv:2404.02948) decomposes every weight.
    """
    shorter = max((min(module.shape) for module in modules if module.kind == "linear"), default=0)
    if options.get("init_lora_weights") != "pissa" or shorter <= _EXACT:
        return options
    return {**options, "init_lora_weights": _APPROXIMATE}


def _same_scaling(options: Mapping[str, Any]) -> float:
    """lora_alpha under which the rank and rule of `options` scale the update as the table does."""
    scaling = OPTIONS["lora_alpha"] / _divisor(OPTIONS)
    alpha: float = scaling * _divisor(options)
    return round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def _divisor(options: Mapping[str, Any]) -> float:
    rank: int = options["r"]
    return math.sqrt(rank) if options.get("use_rslora") else rank
