"""Hooks that do not fit are refused by name; drivers are called alone; observers can do no harm."""

from __future__ import annotations

import logging

import pytest
from hyperion_core import hookimpl
from hyperion_core.config import PluginConfig
from hyperion_core.distributions import PluginEntry
from hyperion_core.errors import ConfigError, PluginHookError
from hyperion_core.hooks import RunHooks, check_hooks
from hyperion_core.kinds import Adapter, Curriculum, Objective, Observer, Safeguard, Scheduler, Tracker


def refused(plugin) -> PluginHookError:
    entry = PluginEntry(plugin.kind, "mine", "acme:Mine", "acme", "1.0", "index")
    with pytest.raises(PluginHookError) as caught:
        check_hooks(plugin, entry)
    assert caught.value.what.startswith(f'the {plugin.kind} "mine" of acme 1.0 ')
    return caught.value


class Building(Scheduler):
    def scheduler_build(self, config, optimizer, horizons):
        return ("built", config, optimizer, horizons)


# --- what is refused ---------------------------------------------------------------------------------


def test_a_missing_hook():
    class Mine(Objective):
        def objective_sequences(self, config, row): ...

    error = refused(Mine)
    assert "lacks the hook objective_loss" in error.what
    assert error.fix == "add a method objective_loss(self, config, logps, segments, scores, reference, normalizer)"


def test_a_misspelt_hook_with_the_kinds_prefix():
    class Mine(Building):
        def scheduler_biuld(self, config): ...

    error = refused(Mine)
    assert "does not know: scheduler_biuld" in error.what
    assert error.fix == 'did you mean "scheduler_build"?'


def test_an_unknown_hook_with_the_kinds_prefix_and_nothing_like_it():
    class Mine(Building):
        def scheduler_frobnicates_everything_now(self): ...

    assert refused(Mine).fix == "see hyperion_core/specs.py"


def test_a_misspelt_required_hook_without_the_prefix():
    class Mine(Scheduler):
        def schedular_build(self, config, optimizer, horizons): ...

    error = refused(Mine)
    assert "lacks the hook scheduler_build" in error.what
    assert error.fix == "rename schedular_build to scheduler_build"


def test_a_misspelt_optional_hook_without_the_prefix():
    class Mine(Curriculum):
        def curriculum_order(self, scores): ...
        def curiculum_score(self, rows): ...

    error = refused(Mine)
    assert "curiculum_score that looks like the misspelt hook curriculum_score" in error.what
    assert error.fix.startswith("rename it to curriculum_score")


def test_a_method_of_its_own_is_nobodys_business():
    class Mine(Building):
        def warm(self): ...
        def build(self): ...

    check_hooks(Mine, PluginEntry("scheduler", "mine", "", "acme", "1", "index"))


def test_an_argument_that_the_hook_does_not_have():
    class Mine(Scheduler):
        def scheduler_build(self, config, optimiser, horizons): ...

    error = refused(Mine)
    assert "scheduler_build does not have: optimiser" in error.what
    assert error.why == "the contract gives config, optimizer, horizons"
    assert error.fix == 'did you mean "optimizer"?'


def test_an_open_end_is_no_argument_of_a_hook_for_nothing_would_arrive_in_it():
    class Mine(Scheduler):
        def scheduler_build(self, config, **rest): ...

    assert "scheduler_build does not have: rest" in refused(Mine).what


def test_an_argument_that_would_never_get_its_value():
    class Defaulted(Observer):
        def run_start(self, plan=None): ...

    class ByKeyword(Scheduler):
        def scheduler_build(self, *, horizons): ...

    error = refused(Defaulted)
    assert "the argument plan of run_start with a default" in error.what
    assert error.fix.startswith("give it no default")
    assert "the argument horizons of scheduler_build" in refused(ByKeyword).what


def test_a_hook_of_another_kind():
    class Mine(Building):
        def adapter_loss(self, model, name): ...

    error = refused(Mine)
    assert "adapter_loss, a hook of another kind" in error.what
    assert "an observer can wrap adapter_loss" in error.fix


def test_only_an_observer_may_wrap_and_only_wrap():
    class Driver(Building):
        @hookimpl(wrapper=True)
        def adapter_loss(self):
            return (yield)

    class Listener(Observer):
        def adapter_loss(self, model, name): ...

    class OldStyle(Observer):
        @hookimpl(hookwrapper=True)
        def adapter_loss(self):
            yield

    class Wrapper(Observer):
        @hookimpl(wrapper=True)
        def adapter_loss(self):
            return (yield)

    assert "a hook of another kind" in refused(Driver).what
    assert refused(Listener).fix == refused(OldStyle).fix == "decorate it with @hookimpl(wrapper=True)"
    check_hooks(Wrapper, PluginEntry("observer", "mine", "", "acme", "1", "index"))


def test_what_pluggy_refuses_is_a_hook_error_with_its_cause():
    class NoGenerator(Observer):
        @hookimpl(wrapper=True)
        def scheduler_build(self):
            return None

    with pytest.raises(PluginHookError, match='observer "mine" does not fit') as caught:
        RunHooks().add(NoGenerator(), "mine")
    assert caught.value.__cause__ is not None


# --- drivers -----------------------------------------------------------------------------------------


def test_undecorated_and_decorated_hooks_work_and_may_take_fewer_arguments():
    class Fewer(Scheduler):
        @hookimpl
        def scheduler_build(self, horizons):
            return horizons

    hooks = RunHooks()
    hooks.add(Building(), "all")
    hooks.add(Fewer(), "few")
    assert hooks.scheduler("all").scheduler_build(1, optimizer=2, horizons=[3]) == ("built", 1, 2, [3])
    assert hooks.scheduler("few").scheduler_build(1, 2, [3]) == [3]


def test_a_call_reaches_the_named_plugin_alone():
    called = []

    class One(Adapter):
        def adapter_unload(self, model, name):
            called.append("one")
            return "one"

    class Two(Adapter):
        def adapter_unload(self, model, name):
            called.append("two")
            return "two"

    hooks = RunHooks()
    hooks.add(One(), "one")
    hooks.add(Two(), "two")
    assert hooks.adapter("one").adapter_unload(model=None, name="a") == "one"
    assert hooks.adapter("two").adapter_unload(model=None, name="a") == "two"
    assert called == ["one", "two"]
    assert hooks.adapter("one").adapter_loss(model=None, name="a") is None, "an optional hook that it lacks"
    with pytest.raises(AttributeError):
        _ = hooks.adapter("one").adapter_zzz
    with pytest.raises(KeyError, match='no adapter called "three"'):
        hooks.adapter("three")


def test_each_kind_of_driver_has_a_typed_door(kind):
    door = kind.kind.replace("-", "_")
    hooks = RunHooks()
    if not hasattr(hooks, door):
        assert kind.kind in {"benchmark", "tracker", "safeguard", "observer"}
        return
    hook = kind.required()[0]
    plugin = type("Mine", (kind,), {hook: lambda self: "mine"})()
    hooks.add(plugin, "mine")
    assert hooks.plugin(kind.kind, "mine") is plugin
    positional = [None] * 10
    assert getattr(getattr(hooks, door)("mine"), hook)(*positional) == "mine"


@pytest.mark.parametrize("base", [Observer, Tracker, Safeguard])
def test_each_plugin_of_a_list_has_its_own_config(base):
    class Options(PluginConfig):
        every: int = 1

    class Demanding(PluginConfig):
        path: str

    mine = type("Mine", (base,), {"config_class": Options})
    hooks, given, plain = RunHooks(), mine(), mine()
    hooks.add(given, "given", Options(every=5))
    hooks.add(plain, "plain")
    assert (given.config, plain.config) == (Options(every=5), Options())
    with pytest.raises(ConfigError, match="Demanding has 1 problem"):
        hooks.add(type("Picky", (base,), {"config_class": Demanding})(), "picky")


def test_a_drivers_config_comes_with_each_call():
    with pytest.raises(TypeError, match="scheduler:mine is a driver"):
        RunHooks().add(Building(), "mine", PluginConfig())


def test_an_error_of_a_driver_goes_through():
    class Failing(Scheduler):
        def scheduler_build(self):
            raise ValueError("no")

    hooks = RunHooks()
    hooks.add(Failing(), "failing")
    with pytest.raises(ValueError, match="no"):
        hooks.scheduler("failing").scheduler_build(None, None, [])


# --- observers ---------------------------------------------------------------------------------------


class Recording(Observer):
    def __init__(self):
        self.seen = []

    def run_step(self, step, metrics):
        self.seen.append(step)


def test_an_observer_that_raises_is_warned_about_once_and_muted_everywhere(caplog):
    class Faulty(Observer):
        calls = 0

        def run_step(self, step):
            Faulty.calls += 1
            raise OSError("disk full")

        def run_end(self, artifact):
            Faulty.calls += 1

    hooks, good = RunHooks(), Recording()
    hooks.add(Faulty(), "faulty")
    hooks.add(good, "good")
    with caplog.at_level(logging.WARNING, "hyperion"):
        for step in (1, 2, 3):
            hooks.observe("run_step", step=step, metrics={}, ctx=None)
        hooks.observe("run_end", artifact=None, ctx=None)
    assert (Faulty.calls, good.seen) == (1, [1, 2, 3])
    (record,) = caplog.records
    assert record.getMessage() == ("observer faulty raised in run_step and is muted for this run: OSError('disk full')")


def test_no_observer_stops_a_run_at_its_start(caplog):
    class Failing(Observer):
        def run_start(self, plan):
            raise RuntimeError("mine")

    class Defaulted(Observer):  # check_hooks refuses it; some versions of pluggy give `plan` by keyword
        def run_start(self, ctx, plan=None):
            raise RuntimeError("mine")

    class Wrapping(Observer):
        @hookimpl(wrapper=True)
        def run_start(self, ctx, plan=None):
            raise RuntimeError("mine")
            yield

    hooks, heard = RunHooks(), []
    listening = type("Listening", (Observer,), {"run_start": lambda self, plan: heard.append(plan)})
    for observer in (Failing, Defaulted, listening, Wrapping):
        hooks.add(observer(), observer.__name__)
    hooks.observe("run_start", plan="the plan", ctx=None)
    assert heard == ["the plan"]
    assert len(caplog.records) == 3


def test_an_observer_may_wrap_another_observers_hook():
    order = []

    class Timing(Observer):
        @hookimpl(wrapper=True)
        def run_step(self, step):
            order.append(("before", step))
            result = yield
            order.append(("after", step))
            return result

    class Plain(Observer):
        def run_step(self, step):
            order.append(("in", step))

    hooks = RunHooks()
    hooks.add(Timing(), "timing")
    hooks.add(Plain(), "plain")
    hooks.observe("run_step", step=1, metrics={}, ctx=None)
    assert order == [("before", 1), ("in", 1), ("after", 1)]


def wrapped(before=None, after=None, rescue=False):
    """A run with a scheduler and an observer that wraps it: `before` and `after` run in the wrapper."""

    class Wrapping(Observer):
        seen: list = []  # noqa: RUF012 - a fresh class each time

        @hookimpl(wrapper=True)
        def scheduler_build(self, config):
            self.seen.append(config)
            if before:
                raise before
            try:
                result = yield
            except ValueError:
                if rescue:
                    return "rescued"
                raise
            self.seen.append(result)
            if after:
                raise after
            return "changed"

    hooks = RunHooks()
    hooks.add(Wrapping(), "wrapping")
    return hooks, Wrapping.seen


def test_a_wrapper_sees_the_result_and_cannot_change_it(caplog):
    hooks, seen = wrapped()
    hooks.add(Building(), "mine")
    result = hooks.scheduler("mine").scheduler_build("c", "o", [])
    assert result == ("built", "c", "o", [])
    assert seen == ["c", result] and not caplog.records


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_wrapper_that_raises_is_muted_and_the_run_goes_on(where, caplog):
    hooks, seen = wrapped(**{where: RuntimeError("mine")})
    hooks.add(Building(), "mine")
    for _ in range(2):
        assert hooks.scheduler("mine").scheduler_build("c", "o", []) == ("built", "c", "o", [])
    assert seen.count("c") == 1, "muted after the first"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("rescue", [True, False])
def test_a_wrapper_cannot_swallow_a_drivers_error(rescue, caplog):
    class Failing(Scheduler):
        def scheduler_build(self):
            raise ValueError("the driver's own")

    hooks, _ = wrapped(rescue=rescue)
    hooks.add(Failing(), "failing")
    with pytest.raises(ValueError, match="the driver's own"):
        hooks.scheduler("failing").scheduler_build("c", "o", [])
    assert not caplog.records


def test_a_wrapper_that_raises_over_a_drivers_error_does_not_hide_it(caplog):
    class Replacing(Observer):
        @hookimpl(wrapper=True)
        def scheduler_build(self):
            try:
                yield
            except ValueError as error:
                raise KeyError("another") from error

    class Failing(Scheduler):
        def scheduler_build(self):
            raise ValueError("the driver's own")

    hooks = RunHooks()
    hooks.add(Replacing(), "replacing")
    hooks.add(Failing(), "failing")
    with pytest.raises(ValueError, match="the driver's own"):
        hooks.scheduler("failing").scheduler_build("c", "o", [])
    assert "raised KeyError" in caplog.text
