"""What `quality: auto` sets: one table, and how it fits to what a config says already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hyperion_core.facts import ModelFacts

from .config import LoraConfig

#: What reached the loss of plain LoRA (rank 16, q_proj and v_proj, AdamW at its best rate) in the fewest steps:
#: benchmarks/results/convergence.md, on a model of 135M parameters, over some forty steps. All linear modules are
#: QLoRA's choice (arXiv:2305.14314).
OPTIONS: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINING: Mapping[str, Any] = {"learning_rate": 3e-3, "optim": "muon", "warmup_ratio": 0.1}
BASIS = "benchmarks/results/convergence.md"
_WIDTH = 576  # of the model that the rate was found on


def training_for(model: ModelFacts) -> dict[str, Any]:
    """The table's keys of `training:`, its learning rate lower for wider models.

    A step of Muon's changes the spectral norm of B by the rate times the root of the width, and the same change of that
    norm is what suits models of any width (Yang et al. 2023, arXiv:2310.17813). That it does was not measured here.
    """
    rate = TRAINING["learning_rate"] * math.sqrt(min(1.0, _WIDTH / max(1, model.hidden_size)))
    return {**TRAINING, "learning_rate": float(f"{rate:.2g}")}


def options_for(config: LoraConfig, model: ModelFacts, *, rank: bool = True) -> dict[str, Any]:
    """The table's options that `config` leaves open and that go with what it says, and with the names of the base.

    Args:
        rank: with r and lora_alpha. Where the config has an r of its own, lora_alpha keeps the table's scaling.
    """
    given = config.model_fields_set
    options = {key: value for key, value in OPTIONS.items() if key not in given}
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


def _same_scaling(options: Mapping[str, Any]) -> float:
    """lora_alpha under which the rank and rule of `options` scale the update as the table does."""
    scaling = OPTIONS["lora_alpha"] / _divisor(OPTIONS)
    alpha: float = scaling * _divisor(options)
    return round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def _divisor(options: Mapping[str, Any]) -> float:
    rank: int = options["r"]
    return math.sqrt(rank) if options.get("use_rslora") else rank
