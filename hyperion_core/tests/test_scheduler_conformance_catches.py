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


SUITE = [name for name in dir(SchedulerConformance) if name.startswith("test_")]
FAULTS = [
    (OneForAll, "test_every_group_follows_its_own_horizon", {}),
    (NoWarmup, "test_the_warmup_rises_to_the_base_learning_rate", {}),
    (GoesNegative, "test_it_is_never_negative_and_goes_on_beyond_the_end", {"total": 5, "warmup": 0}),
    (StopsAtTheEnd, "test_it_is_never_negative_and_goes_on_beyond_the_end", {"total": 5, "warmup": 0}),
    (StopsAtTheEnd, "test_without_warmup_it_starts_at_the_base", {}),
    (Forgetful, "test_it_resumes_to_the_bit", {"done": 10}),
    (Random, "test_it_draws_no_random_numbers", {}),
    (NotAScheduler, "test_it_sets_the_first_learning_rate", {}),
]


@pytest.fixture
def suite(registry):
    def of(plugin):
        registry.add(plugin, "warm")
        return type("Suite", (SchedulerConformance,), {"plugin": "warm"})()

    return of


@pytest.mark.parametrize("plugin, test, arguments", FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_faulty_scheduler_is_caught(suite, plugin, test, arguments):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        getattr(suite(plugin), test)(plugin, plugin.config_class(), **arguments)


def test_a_config_that_is_not_strict_or_bears_another_name_is_caught(suite):
    class Loose(WarmConfig):
        model_config = {"extra": "ignore"}  # noqa: RUF012 - pydantic's own way
        type: str = "warmer"

    class Misnamed(Warm):
        config_class = Loose

    checked = suite(Misnamed)
    with pytest.raises(AssertionError):
        checked.test_the_config_names_its_plugin(Loose())
    with pytest.raises(pytest.fail.Exception):
        checked.test_an_unknown_key_is_refused_with_a_suggestion(Loose())


def test_a_heavy_import_is_caught(fake_dist):
    source = """
        import torch
        from hyperion_core.kinds import Scheduler
        class Heavy(Scheduler):
            def scheduler_build(self): ...
    """
    fake_dist("acme-heavy", {"hyperion.schedulers": {"heavy": "acme_heavy:Heavy"}}, {"acme_heavy": source})
    suite = type("Suite", (SchedulerConformance,), {"plugin": "heavy"})()
    with pytest.raises(AssertionError, match="imports torch"):
        suite.test_importing_the_plugin_is_light()


class TestASoundScheduler(SchedulerConformance):
    """Two lines, as a third party writes them, once the plugin is installed: here it is registered by hand."""

    plugin = "warm"

    @pytest.fixture(autouse=True)
    def _installed(self, registry):
        registry.add(Warm, "warm")
