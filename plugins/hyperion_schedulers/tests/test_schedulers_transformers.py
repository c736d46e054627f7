"""Against transformers itself: the same numbers, every option honoured, faults in our words."""

from __future__ import annotations

import inspect
import warnings

import pytest
from hyperion_core.errors import ConfigError, TrainingError
from hyperion_core.facts import Horizon
from hyperion_core.registry import registry

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RATE = 1e-2
OPTIONS = [
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.25, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.25, "warmup_lr_rate": 0.5, "num_cycles": 1.0}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-4}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 15}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 4, "warmup_type": "cosine",
                             "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "num_cycles": 1.5, "warmup_type": "1-sqrt"}),
]  # fmt: skip


def optimizer(rates=(RATE,)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=RATE)


def rates_of(chosen, schedule, steps=60):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in chosen.param_groups])
        chosen.step()
        schedule.step()
    return rates


def build(name, options, chosen, *horizons):
    plugin = registry().load("scheduler", name)
    return plugin().scheduler_build(plugin.config_class(**options), chosen, list(horizons))


@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.parametrize("total, warmup", [(40, 10), (40, 0)])
def test_equals_get_scheduler_to_the_bit(name, options, total, warmup):
    ours, theirs = optimizer((RATE, RATE / 8)), optimizer((RATE, RATE / 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = build(name, options, ours, Horizon(total, warmup), Horizon(total, warmup))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of num_stable_steps beside the training steps
        reference = transformers.get_scheduler(
            name, theirs, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=options
        )
    assert rates_of(ours, schedule) == rates_of(theirs, reference)


def test_every_schedule_of_transformers_that_follows_the_step_is_here_with_all_its_options():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    steered_by_metrics = {"reduce_lr_on_plateau", "greedy"}
    given_by_the_run = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    theirs = {
        name.value: set(inspect.signature(function).parameters) - given_by_the_run
        for name, function in TYPE_TO_SCHEDULER_FUNCTION.items()
        if name.value not in steered_by_metrics
    }
    ours = {
        entry.name: set(registry().load("scheduler", entry.name).config_class.allowed_keys()) - {"type"}
        for entry in registry().entries("scheduler")
        if entry.distribution == "hyperion-schedulers"
    }
    assert ours == theirs


@pytest.mark.parametrize("share, steps", [(0.25, 10), (0.29, 11), (0.3, 12)])
def test_a_share_of_the_run_is_the_same_as_so_many_steps(share, steps):
    one, other = optimizer(), optimizer()
    first = build("warmup_stable_decay", {"num_decay_steps": share, "num_stable_steps": 0.5}, one, Horizon(40, 2))
    second = build("warmup_stable_decay", {"num_decay_steps": steps, "num_stable_steps": 20}, other, Horizon(40, 2))
    assert rates_of(one, first) == rates_of(other, second)


def test_stages_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(TrainingError, match=r"warmup 30 \+ stable 0 \+ decay 20 steps are more than the 40"):
        build("warmup_stable_decay", {"num_decay_steps": 20}, optimizer(), Horizon(40, 30))


@pytest.mark.parametrize("name, options", [("polynomial", {"lr_end": RATE}), ("cosine_with_min_lr", {"min_lr": 0.5})])
def test_a_floor_above_the_learning_rate_is_refused(name, options):
    with pytest.raises(TrainingError, match="cannot go down") as caught:
        build(name, options, optimizer(), Horizon(40, 10))
    assert "learning_rate" in caught.value.fix


@pytest.mark.parametrize(
    "name, options, where",
    [
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "min_lr_rate"),
        ("cosine_with_min_lr", {}, ""),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "min_lr_rate"),
        ("polynomial", {"power": 0}, "power"),
        ("cosine", {"num_cycles": "two"}, "num_cycles"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "num_cycles"),
        ("warmup_stable_decay", {"decay_type": "cubic"}, "decay_type"),
        ("warmup_stable_decay", {"num_decay_steps": 1.5}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 0}, "num_decay_steps"),
        ("linear", {"num_cycles": 1}, "num_cycles"),
    ],
)
def test_impossible_options_are_refused_before_anything_heavy(name, options, where):
    with pytest.raises(ConfigError) as caught:
        registry().load("scheduler", name).config_class.parse(options)
    assert [problem.path for problem in caught.value.problems] == [where]


@pytest.mark.parametrize(
    "name, options, where",
    [
        ("polynomial", {"lr_end": RATE}, "lr_end"),
        ("cosine_with_min_lr", {"min_lr": 0.5}, "min_lr"),
        ("warmup_stable_decay", {"num_decay_steps": 31}, ""),
        ("constant", {}, ""),
    ],
)
def test_what_does_not_fit_the_run_is_found_while_planning(name, options, where):
    plugin = registry().load("scheduler", name)
    (problem,) = plugin().scheduler_check(plugin.config_class(**options), Horizon(40, 10), RATE)
    assert problem.path == where and problem.why and problem.fix


def test_constant_says_that_it_has_no_warmup(caplog):
    chosen = optimizer()
    schedule = build("constant", {}, chosen, Horizon(40, 10))
    assert {rate for (rate,) in rates_of(chosen, schedule)} == {RATE}
    assert "its 10 steps are not used" in caplog.text
    caplog.clear()
    build("constant", {}, optimizer(), Horizon(40))
    assert not caplog.text


def test_a_horizon_for_every_group_is_asked_for():
    with pytest.raises(ValueError, match="1 horizons for 2 parameter groups"):
        build("linear", {}, optimizer((RATE, RATE)), Horizon(40))
