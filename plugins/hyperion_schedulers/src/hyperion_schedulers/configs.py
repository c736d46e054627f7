"""Options of the schedules, under the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from hyperion_core.config import PluginConfig
from hyperion_core.errors import Problem
from pydantic import Field, PositiveFloat, PositiveInt

Ratio = Annotated[float, Field(ge=0, le=1)]
StepsOrShare = PositiveInt | Annotated[float, Field(gt=0, lt=1)]
Shape = Literal["linear", "cosine", "1-sqrt"]


class ConstantConfig(PluginConfig):
    """The base learning rate throughout; warmup steps are not used."""

    type: str = "constant"


class ConstantWithWarmupConfig(PluginConfig):
    """The base learning rate, after the warmup."""

    type: str = "constant_with_warmup"


class LinearConfig(PluginConfig):
    """Down to 0 in a straight line."""

    type: str = "linear"


class CosineConfig(PluginConfig):
    """Down to 0 along a cosine."""

    type: str = "cosine"
    num_cycles: PositiveFloat = Field(0.5, description="Waves of the cosine; 0.5 goes down once.")


class CosineWithRestartsConfig(PluginConfig):
    """Down to 0 along a cosine, several times, each from the base learning rate."""

    type: str = "cosine_with_restarts"
    num_cycles: PositiveInt = Field(1, description="How many times it goes down.")


class CosineWithMinLrConfig(PluginConfig):
    """Down to a floor along a cosine. `min_lr` or `min_lr_rate` gives the floor."""

    type: str = "cosine_with_min_lr"
    num_cycles: PositiveFloat = Field(0.5, description="Waves of the cosine; 0.5 goes down once.")
    min_lr: float | None = Field(
        None, ge=0, description="The floor, for the run's learning rate; other groups' floors keep the same proportion."
    )
    min_lr_rate: Ratio | None = Field(None, description="The floor, as a share of the base learning rate.")

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        given = [key for key in ("min_lr", "min_lr_rate") if data.get(key) is not None]
        if len(given) == 2:
            return [Problem("min_lr_rate", "min_lr is given too", "both say where the floor is", "remove one of them")]
        if not given:
            return [
                Problem("", "neither min_lr nor min_lr_rate is given", "the floor is unknown", "add min_lr_rate: 0.1")
            ]
        return []


class CosineWarmupWithMinLrConfig(CosineWithMinLrConfig):
    """As cosine_with_min_lr, but the warmup starts above 0 and ends one step earlier."""

    type: str = "cosine_warmup_with_min_lr"
    warmup_lr_rate: Ratio | None = Field(
        None, description="Where the warmup starts, as a share of the base learning rate; None is 1/warmup steps."
    )


class PolynomialConfig(PluginConfig):
    """Down to `lr_end` along a polynomial."""

    type: str = "polynomial"
    lr_end: float = Field(
        1e-7, ge=0, description="The end, for the run's learning rate; other groups' ends keep the same proportion."
    )
    power: PositiveFloat = Field(1.0, description="The polynomial's degree; 1 is a straight line.")


class InverseSqrtConfig(PluginConfig):
    """Down as 1/√step."""

    type: str = "inverse_sqrt"
    timescale: PositiveInt | None = Field(
        None, description="Steps that count as one unit of time; None is the warmup steps, or 10,000 without warmup."
    )


class WarmupStableDecayConfig(PluginConfig):
    """Up, level, down: three stages. Source: MiniCPM, arXiv 2404.06395."""

    type: str = "warmup_stable_decay"
    num_decay_steps: StepsOrShare = Field(
        0.1, description="Length of the last stage: steps, or below 1 a share of the whole run, rounded down."
    )
    num_stable_steps: StepsOrShare | None = Field(
        None, description="Length of the level stage, likewise; None is what warmup and decay leave."
    )
    warmup_type: Shape = Field("linear", description="Shape of the first stage.")
    decay_type: Shape = Field("cosine", description="Shape of the last stage.")
    min_lr_ratio: Ratio = Field(0.0, description="Where it starts and ends, as a share of the base learning rate.")
    num_cycles: PositiveFloat = Field(0.5, description="Waves of a cosine decay; 0.5 goes down once.")
