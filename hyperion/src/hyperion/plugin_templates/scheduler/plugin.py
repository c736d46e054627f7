"""A learning-rate schedule: up in a straight line, then down along a polynomial to a floor.

Written on Hyperion's contract alone. To make it yours, change `factor` and the options of the config.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hyperion_core.config import PluginConfig
from hyperion_core.errors import Problem
from hyperion_core.facts import Horizon
from hyperion_core.kinds import Scheduler
from pydantic import Field, PositiveFloat

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

__all__ = ["ChangemeConfig", "ChangemeScheduler", "factor"]


class ChangemeConfig(PluginConfig):
    """What a user may write below `lr_scheduler:`. Unknown keys are refused with a suggestion."""

    type: str = "changeme"
    power: PositiveFloat = Field(2.0, description="The polynomial's degree; 1 is a straight line.")
    floor: float = Field(0.1, ge=0, lt=1, description="Where it ends, as a share of the base learning rate.")


class ChangemeScheduler(Scheduler):
    """Every parameter group follows the horizon of its own."""

    config_class = ChangemeConfig

    def scheduler_check(self, config: ChangemeConfig, horizon: Horizon) -> list[Problem]:
        """Called while a run is planned: no torch here."""
        if horizon.warmup < horizon.total:
            return []
        what = f"all {horizon.total} steps of the run are warmup"
        fix = "give a smaller warmup_ratio or warmup_steps, or train longer"
        return [Problem("", what, "the learning rate would never come down", fix)]

    def scheduler_build(self, config: ChangemeConfig, optimizer: Optimizer, horizons: list[Horizon]) -> LRScheduler:
        """Sets the first learning rate. The state that a resumed run needs is the step, which LambdaLR keeps."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, [partial(factor, config, horizon) for horizon in horizons])


def factor(config: ChangemeConfig, horizon: Horizon, step: int) -> float:
    """Learning rate over base learning rate at `step`, from 0; a run may go on beyond its horizon."""
    if step < horizon.warmup:
        return step / horizon.warmup
    after = max(1, horizon.total - horizon.warmup)
    done = min(1.0, (step - horizon.warmup) / after)
    remaining: float = (1 - done) ** config.power
    return config.floor + (1 - config.floor) * remaining
