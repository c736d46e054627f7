"""One plugin class a schedule; all of them build theirs with `transformers.get_scheduler`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from hyperion_core.config import PluginConfig
from hyperion_core.errors import Problem, TrainingError
from hyperion_core.facts import Horizon
from hyperion_core.kinds import Scheduler

from .configs import (
    ConstantConfig,
    ConstantWithWarmupConfig,
    CosineConfig,
    CosineWarmupWithMinLrConfig,
    CosineWithMinLrConfig,
    CosineWithRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    PolynomialConfig,
    WarmupStableDecayConfig,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

log = logging.getLogger("hyperion")


class TransformersSchedule(Scheduler):
    """A schedule that transformers knows as `schedule`: the same factors, to the bit, for one horizon.

    Where parameter groups have different horizons, each group follows the factors of its own.
    """

    schedule: ClassVar[str]
    #: The option that gives an absolute learning rate to end at, if there is one.
    floor: ClassVar[str | None] = None

    def scheduler_check(self, config: PluginConfig, horizon: Horizon, learning_rate: float) -> list[Problem]:
        return self.misfits(config, horizon, learning_rate)

    def scheduler_build(self, config: PluginConfig, optimizer: Optimizer, horizons: list[Horizon]) -> LambdaLR:
        """Sets the learning rate of step 0 and gives the schedule; call its `step()` after each optimizer step.

        Raises:
            TrainingError: the options do not fit the learning rate or the number of steps.
        """
        from torch.optim.lr_scheduler import LambdaLR

        if len(horizons) != len(optimizer.param_groups):
            raise ValueError(f"{len(horizons)} horizons for {len(optimizer.param_groups)} parameter groups")
        rate = float(optimizer.defaults["lr"])
        factors = {horizon: self._factors(config, rate, horizon) for horizon in dict.fromkeys(horizons)}
        return LambdaLR(optimizer, [factors[horizon] for horizon in horizons])

    def misfits(self, config: PluginConfig, horizon: Horizon, rate: float) -> list[Problem]:
        """Options that no schedule can be built from; paths are keys of the config."""
        lowest = getattr(config, self.floor) if self.floor else None
        if lowest is None or lowest < rate:
            return []
        what = f'the schedule "{self.schedule}" cannot go down to {self.floor} = {lowest:g}'
        why = f"the learning rate is {rate:g}, which is not above it"
        return [Problem(str(self.floor), what, why, f"give a smaller {self.floor}, or a larger learning_rate")]

    def arguments(self, config: PluginConfig, horizon: Horizon) -> tuple[int | None, dict[str, Any]]:
        """What `get_scheduler` is given: training steps and the schedule's own arguments."""
        return horizon.total, config.model_dump(exclude={"type"}, exclude_none=True)

    def _factors(self, config: PluginConfig, rate: float, horizon: Horizon) -> Callable[[int], float]:
        """Learning rate over base learning rate, by step."""
        import torch
        from transformers import get_scheduler

        for problem in self.misfits(config, horizon, rate):
            raise TrainingError(problem.what, why=problem.why, fix=problem.fix)
        steps, options = self.arguments(config, horizon)
        # A schedule reads nothing of an optimizer but its learning rate, and it sets one: so it is given another.
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=rate)
        built = get_scheduler(
            self.schedule,
            stand_in,
            num_warmup_steps=horizon.warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        return built.lr_lambdas[0]


class Constant(TransformersSchedule):
    """The base learning rate throughout."""

    schedule = "constant"
    config_class = ConstantConfig

    def scheduler_check(self, config: PluginConfig, horizon: Horizon, learning_rate: float) -> list[Problem]:
        if not horizon.warmup:
            return []
        what = f'the schedule "{self.schedule}" has no warmup'
        why = f"its {horizon.warmup} steps would not be used"
        return [Problem("", what, why, "choose constant_with_warmup, or leave out warmup_ratio and warmup_steps")]

    def arguments(self, config: PluginConfig, horizon: Horizon) -> tuple[int | None, dict[str, Any]]:
        if horizon.warmup:
            log.warning(
                "the schedule constant has no warmup: its %d steps are not used; constant_with_warmup has one",
                horizon.warmup,
            )
        return super().arguments(config, horizon)


class ConstantWithWarmup(TransformersSchedule):
    """Up, then level."""

    schedule = "constant_with_warmup"
    config_class = ConstantWithWarmupConfig


class Linear(TransformersSchedule):
    """Up, then down to 0 in a straight line."""

    schedule = "linear"
    config_class = LinearConfig


class Cosine(TransformersSchedule):
    """Up, then down to 0 along a cosine. Source: SGDR, arXiv 1608.03983."""

    schedule = "cosine"
    config_class = CosineConfig


class CosineWithRestarts(TransformersSchedule):
    """Up, then down along a cosine several times. Source: SGDR, arXiv 1608.03983."""

    schedule = "cosine_with_restarts"
    config_class = CosineWithRestartsConfig


class CosineWithMinLr(TransformersSchedule):
    """Up, then down to a floor along a cosine."""

    schedule = "cosine_with_min_lr"
    floor = "min_lr"
    config_class = CosineWithMinLrConfig


class CosineWarmupWithMinLr(TransformersSchedule):
    """Up from above 0, then down to a floor along a cosine."""

    schedule = "cosine_warmup_with_min_lr"
    floor = "min_lr"
    config_class = CosineWarmupWithMinLrConfig


class Polynomial(TransformersSchedule):
    """Up, then down to `lr_end` along a polynomial."""

    schedule = "polynomial"
    floor = "lr_end"
    config_class = PolynomialConfig

    def arguments(self, config: PluginConfig, horizon: Horizon) -> tuple[int | None, dict[str, Any]]:
        _, options = super().arguments(config, horizon)
        # transformers divides by the steps after the warmup: a warmup as long as the run would end it with an error.
        return max(horizon.total, horizon.warmup + 1), options


class InverseSqrt(TransformersSchedule):
    """Up, then down as 1/√step. Source: Scaling Vision Transformers, arXiv 2106.04560."""

    schedule = "inverse_sqrt"
    config_class = InverseSqrtConfig


class WarmupStableDecay(TransformersSchedule):
    """Up, level, down. Source: MiniCPM, arXiv 2404.06395."""

    schedule = "warmup_stable_decay"
    config_class = WarmupStableDecayConfig

    def misfits(self, config: PluginConfig, horizon: Horizon, rate: float) -> list[Problem]:
        stable, decay = self._stages(config, horizon)
        if stable >= 0 and horizon.warmup + stable + decay <= horizon.total:
            return []
        return [
            Problem(
                "",
                f'the stages of the schedule "{self.schedule}" do not fit into the run',
                f"warmup {horizon.warmup} + stable {max(stable, 0)} + decay {decay} steps are more than the "
                f"{horizon.total} of the run",
                "give smaller num_decay_steps, num_stable_steps or warmup_steps, or train longer",
            )
        ]

    def arguments(self, config: PluginConfig, horizon: Horizon) -> tuple[int | None, dict[str, Any]]:
        _, options = super().arguments(config, horizon)
        stable, decay = self._stages(config, horizon)
        # The stages are counted out here: given the run's steps as well, transformers would warn.
        return None, options | {"num_decay_steps": decay, "num_stable_steps": stable}

    @staticmethod
    def _stages(config: PluginConfig, horizon: Horizon) -> tuple[int, int]:
        """Steps of the level stage and of the last one; the first is below 0 where warmup and decay leave nothing."""
        assert isinstance(config, WarmupStableDecayConfig)
        decay = _in_steps(config.num_decay_steps, horizon.total)
        if config.num_stable_steps is None:
            return horizon.total - horizon.warmup - decay, decay
        return _in_steps(config.num_stable_steps, horizon.total), decay


def _in_steps(length: int | float, total: int) -> int:
    """A share of the run is rounded down; the nudge keeps 0.29 × 100 at 29."""
    return length if isinstance(length, int) else int(length * total + 1e-9)
