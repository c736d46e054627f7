"""The conformance suite of schedulers."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ..config import PluginConfig
from ..facts import Horizon
from ..hooks import RunHooks
from ..kinds import Plugin
from .plugins import PluginConformance

if TYPE_CHECKING:
    from torch.optim import Optimizer

BASE = 1e-2  # the run's learning rate in all tests


class SchedulerConformance(PluginConformance):
    """What a scheduler must do. A test is two lines:

        class TestCosine(SchedulerConformance):
            plugin = "cosine"

    warms_up: False for a schedule that begins at the base learning rate, whatever the warmup.
    starts_at: the first learning rate of a warmup, as a share of the base.
    """

    kind = "scheduler"
    warms_up: ClassVar[bool] = True
    starts_at: ClassVar[float] = 0.0

    def build(
        self, plugin: type[Plugin], config: PluginConfig, *horizons: Horizon, rates: tuple[float, ...] = ()
    ) -> tuple[Optimizer, Any]:
        """An optimizer with one parameter group a horizon, at `rates` (BASE unless given), and its schedule."""
        torch = pytest.importorskip("torch")
        rates = rates or (BASE,) * len(horizons)
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
        optimizer = torch.optim.AdamW(groups, lr=BASE)
        hooks = RunHooks()
        hooks.add(plugin(), self.plugin)
        scheduler = hooks.scheduler(self.plugin).scheduler_build(config, optimizer, list(horizons))
        return optimizer, scheduler

    def test_it_sets_the_first_learning_rate(self, plugin_class: type[Plugin], config: PluginConfig) -> None:
        """It gives an LRScheduler, and the optimizer begins at the rates that it reports."""
        optimizer, scheduler = self.build(plugin_class, config, Horizon(40, 10))
        torch = pytest.importorskip("torch")
        assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler), (
            f"scheduler_build gives a {type(scheduler).__name__}, not a torch.optim.lr_scheduler.LRScheduler"
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == scheduler.get_last_lr(), (
            f"the optimizer begins at {rates}, and the scheduler reports {scheduler.get_last_lr()}"
        )

    def test_the_warmup_rises_to_the_base_learning_rate(self, plugin_class: type[Plugin], config: PluginConfig) -> None:
        """From `starts_at`, step by step, to the base learning rate at the end of the warmup."""
        (rates,) = learning_rates(*self.build(plugin_class, config, Horizon(40, 10)), steps=11)
        if not self.warms_up:
            assert rates[0] == pytest.approx(BASE), (
                f"warms_up is False, and the first learning rate is {rates[0]:g}, not the base's {BASE:g}"
            )
            return
        peak = rates.index(max(rates))
        assert rates[0] == pytest.approx(self.starts_at * BASE, abs=1e-12), (
            f"the warmup starts at {rates[0]:g}, and starts_at declares {self.starts_at * BASE:g}"
        )
        assert peak in (9, 10), f"a warmup of 10 steps has its peak at step {peak}"
        assert all(a < b for a, b in pairwise(rates[: peak + 1])), f"the warmup does not rise steadily: {rates}"
        assert rates[peak] == pytest.approx(BASE), f"the warmup ends at {rates[peak]:g}, not at the base's {BASE:g}"

    def test_without_warmup_it_starts_at_the_base(self, plugin_class: type[Plugin], config: PluginConfig) -> None:
        """The first step has the base learning rate."""
        (rates,) = learning_rates(*self.build(plugin_class, config, Horizon(400)), steps=1)
        assert rates[0] == pytest.approx(BASE, rel=1e-3), (
            f"without a warmup the first learning rate is {rates[0]:g}, not the base's {BASE:g}"
        )

    def test_every_group_follows_its_own_horizon(self, plugin_class: type[Plugin], config: PluginConfig) -> None:
        """Parameter groups with other horizons and rates do not disturb each other."""
        horizons, base = (Horizon(40, 10), Horizon(80, 30)), (BASE, BASE / 4)
        together = learning_rates(*self.build(plugin_class, config, *horizons, rates=base), steps=80)
        for group, (horizon, rate) in enumerate(zip(horizons, base, strict=True)):
            (alone,) = learning_rates(*self.build(plugin_class, config, horizon, rates=(rate,)), steps=80)
            assert together[group] == alone, f"group {group} does not follow its own horizon, {horizon}"
            if self.warms_up:
                early = together[group][: horizon.warmup + 1]
                peak = early.index(max(early))
                assert peak in (horizon.warmup - 1, horizon.warmup), (
                    f"group {group} has its peak at step {peak}, and its warmup takes {horizon.warmup}"
                )
                assert max(early) == pytest.approx(rate), (
                    f"group {group} rises to {max(early):g}, and its own learning rate is {rate:g}"
                )

    @pytest.mark.parametrize("total, warmup", [(40, 10), (40, 0), (5, 5), (1, 1), (1, 0)])
    def test_it_is_never_negative_and_goes_on_beyond_the_end(
        self, plugin_class: type[Plugin], config: PluginConfig, total: int, warmup: int
    ) -> None:
        """Rates are finite and not negative, on the shortest runs and after the last step too."""
        steps = 2 * total + 10
        built = self.build(plugin_class, config, Horizon(total, warmup))
        try:
            (rates,) = learning_rates(*built, steps=steps)
        except ArithmeticError as error:
            pytest.fail(f"a run of {total} steps ends in {type(error).__name__}: {error}")
        bad = {step: rate for step, rate in enumerate(rates) if not math.isfinite(rate) or rate < 0}
        assert not bad, f"in a run of {total} steps the learning rate is negative or not finite, by step: {bad}"

    @pytest.mark.parametrize("done", [0, 1, 9, 10, 25, 40])
    def test_it_resumes_to_the_bit(self, plugin_class: type[Plugin], config: PluginConfig, done: int) -> None:
        """Saved and loaded at any step, it goes on with the same rates."""
        torch = pytest.importorskip("torch")
        horizons, base = (Horizon(40, 10), Horizon(60, 20)), (BASE, BASE / 4)
        optimizer, scheduler = self.build(plugin_class, config, *horizons, rates=base)
        learning_rates(optimizer, scheduler, steps=done)
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
        expected = learning_rates(optimizer, scheduler, steps=50 - done)

        file.seek(0)
        state = torch.load(file, weights_only=True)
        optimizer, scheduler = self.build(plugin_class, config, *horizons, rates=base)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        resumed = learning_rates(optimizer, scheduler, steps=50 - done)
        assert resumed == expected, f"resumed after step {done}, it goes on with other learning rates"

    def test_it_draws_no_random_numbers(self, plugin_class: type[Plugin], config: PluginConfig) -> None:
        """The rates depend on no seed, and the run's generator stays as it was."""
        torch = pytest.importorskip("torch")
        torch.manual_seed(1)
        one = learning_rates(*self.build(plugin_class, config, Horizon(40, 10)), steps=50)
        torch.manual_seed(2)
        optimizer, scheduler = self.build(plugin_class, config, Horizon(40, 10))
        state = torch.get_rng_state()
        assert learning_rates(optimizer, scheduler, steps=50) == one, "the schedule depends on the seed"
        assert torch.equal(torch.get_rng_state(), state), "the schedule disturbs the run's random numbers"


def learning_rates(optimizer: Optimizer, scheduler: Any, *, steps: int) -> list[list[float]]:
    """The learning rates of the next `steps` optimizer steps, a list for each parameter group."""
    rates: list[list[float]] = [[] for _ in optimizer.param_groups]
    for _ in range(steps):
        for seen, group in zip(rates, optimizer.param_groups, strict=True):
            seen.append(float(group["lr"]))
        optimizer.step()
        scheduler.step()
    return rates
