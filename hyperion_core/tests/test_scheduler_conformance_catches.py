"""The scheduler suite lets a sound scheduler through, and refuses each kind of fault."""

from __future__ import annotations

import random

import pytest
from hyperion_core.config import PluginConfig
from hyperion_core.kinds import Scheduler
from hyperion_core.testing import SchedulerConformance

torch = pytest.importorskip("torch")
LambdaLR = torch.optim.lr_scheduler.LambdaLR


class WarmConfig(PluginConfig):
    type: str = "warm"
    power: float = 1.0


def factor(horizon, step):
    if step < horizon.warmup:
        return step / horizon.warmup
    return max(0.0, 1 - (step - horizon.warmup) / max(1, horizon.total - horizon.warmup))


class Warm(Scheduler):
    config_class = WarmConfig

    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=horizon: factor(h, step) for horizon in horizons])


class OneForAll(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, lambda step: factor(horizons[0], step))


class NoWarmup(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: max(0.0, 1 - step / h.total) for h in horizons])


class GoesNegative(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: 1 - step / h.total for h in horizons])


class StopsAtTheEnd(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: 1 / (h.total + 5 - step) for h in horizons])


class Forgetful(Warm):
    def scheduler_build(self, optimizer, horizons):
        class Counting(LambdaLR):
            calls = 0

            def get_lr(self):
                self.calls += 1
                return [base / self.calls for base in self.base_lrs]

            def state_dict(self):
                return {key: value for key, value in super().state_dict().items() if key != "calls"}

        return Counting(optimizer, lambda step: 1.0)


class Random(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, lambda step: float(torch.rand(())))


class NotAScheduler(Warm):
    def scheduler_build(self, optimizer, horizons):
        return random.Random()


class StartsElsewhere(Warm):
    """Reports another learning rate than the optimizer begins with."""

    def scheduler_build(self, optimizer, horizons):
        scheduler = super().scheduler_build(optimizer, horizons)
        optimizer.param_groups[0]["lr"] = 1.0
        return scheduler


class EndsWarmupTooLow(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: 0.9 * factor(h, step) for h in horizons])


class WarmsUpInJumps(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: factor(h, step - (step < 9 and step % 2)) for h in horizons])


class WarmsUpTwiceAsFast(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: min(1.0, 2 * step / max(1, h.warmup)) for h in horizons])


class WarmsUpFromTheMiddle(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: max(0.5, factor(h, step)) for h in horizons])


class StartsLowWithoutWarmup(Warm):
    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: (step + 1) / h.total for h in horizons])


class DrawsAndForgets(Warm):
    """Its rates are the same every time, and the run's generator is not."""

    def scheduler_build(self, optimizer, horizons):
        return LambdaLR(optimizer, [lambda step, h=h: factor(h, step) + 0 * torch.rand(()).item() for h in horizons])


FIRST = "test_it_sets_the_first_learning_rate"
WARMUP = "test_the_warmup_rises_to_the_base_learning_rate"
NO_WARMUP = "test_without_warmup_it_starts_at_the_base"
GROUPS = "test_every_group_follows_its_own_horizon"
BOUNDS = "test_it_is_never_negative_and_goes_on_beyond_the_end"
RESUMES = "test_it_resumes_to_the_bit"
RANDOM = "test_it_draws_no_random_numbers"
ARGUMENTS = {BOUNDS: {"total": 5, "warmup": 0}, RESUMES: {"done": 10}}

BROKEN = [
    (NotAScheduler, FIRST, "scheduler_build gives a Random, not a torch.optim.lr_scheduler.LRScheduler"),
    (StartsElsewhere, FIRST, r"the optimizer begins at \[1.0\], and the scheduler reports"),
    (WarmsUpFromTheMiddle, WARMUP, "the warmup starts at 0.005, and starts_at declares 0"),
    (WarmsUpTwiceAsFast, WARMUP, "a warmup of 10 steps has its peak at step 5"),
    (WarmsUpInJumps, WARMUP, "the warmup does not rise steadily"),
    (EndsWarmupTooLow, WARMUP, "the warmup ends at 0.009, not at the base's 0.01"),
    (NoWarmup, WARMUP, "the warmup starts at 0.01, and starts_at declares 0"),
    (StartsLowWithoutWarmup, NO_WARMUP, "without a warmup the first learning rate is 2.5e-05, not the base's 0.01"),
    (OneForAll, GROUPS, r"group 1 does not follow its own horizon, Horizon\(total=80, warmup=30\)"),
    (GoesNegative, BOUNDS, "in a run of 5 steps the learning rate is negative or not finite, by step: {6: -0.00"),
    (StopsAtTheEnd, BOUNDS, "a run of 5 steps ends in ZeroDivisionError"),
    (Forgetful, RESUMES, "resumed after step 10, it goes on with other learning rates"),
    (Random, RANDOM, "the schedule depends on the seed"),
    (DrawsAndForgets, RANDOM, "the schedule disturbs the run's random numbers"),
]


@pytest.mark.parametrize("plugin, test, message", BROKEN, ids=[f"{b.__name__}-{t}" for b, t, _ in BROKEN])
def test_a_broken_scheduler_is_caught(registry, plugin, test, message):
    registry.add(plugin, "warm")
    suite = TestASoundScheduler()
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        getattr(suite, test)(plugin, plugin.config_class(), **ARGUMENTS.get(test, {}))


def test_a_warmup_that_is_declared_away_must_be_away(registry):
    suite = TestASoundScheduler()
    suite.warms_up = False
    with pytest.raises(AssertionError, match="warms_up is False, and the first learning rate is 0"):
        suite.test_the_warmup_rises_to_the_base_learning_rate(Warm, WarmConfig())


class TestASoundScheduler(SchedulerConformance):
    """Two lines, as a third party writes them, once the plugin is installed: here it is registered by hand."""

    plugin = "warm"

    @pytest.fixture(autouse=True)
    def _installed(self, registry):
        registry.add(Warm, "warm")
