"""One base class per kind of plugin. A plugin inherits one, names its config model, and writes its hooks."""

from __future__ import annotations

from typing import ClassVar

from . import specs
from .config import AdapterConfig, PluginConfig, QuantizationConfig, StrictModel
from .facts import Capabilities, Provides


class Plugin:
    """Base of every plugin. An instance is made without arguments, once a run, and must be cheap to make.

    `config_class` is the strict model of the plugin's own options; it lives in the plugin's light module. A driver is
    given its config with each call; a `ListedPlugin` finds it in `self.config`.
    """

    kind: ClassVar[str]
    group: ClassVar[str]
    prefix: ClassVar[str]
    hooks: ClassVar[type]
    config_class: ClassVar[type[StrictModel]] = PluginConfig

    @classmethod
    def required(cls) -> tuple[str, ...]:
        """Names of the hooks that this plugin must have."""
        return specs.required_hooks(cls.hooks)


class ListedPlugin(Plugin):
    """Base of the kinds of which a list acts at once: one call reaches all, so it carries no plugin's config.

    `self.config`: this plugin's options, an instance of `config_class`; set before its first hook.
    """

    config: StrictModel


class Adapter(Plugin):
    """Trainable parameters on a frozen base."""

    kind = "adapter"
    group = "hyperion.adapters"
    prefix = "adapter_"
    hooks = specs.AdapterSpecs
    config_class: ClassVar[type[StrictModel]] = AdapterConfig
    capabilities: ClassVar[Capabilities] = Capabilities()

    @classmethod
    def required(cls) -> tuple[str, ...]:
        declared = {
            "adapter_route": cls.capabilities.per_token,
            "adapter_merge_weight": cls.capabilities.mergeable,
            "adapter_combine": cls.capabilities.combinable,
        }
        return (*super().required(), *(hook for hook, wanted in declared.items() if wanted))


class Quantizer(Plugin):
    """Weights held in fewer bits.

    `trained_under`: adapters that its own tests train on top of it. Of another one that fits the plan says "untested".
    """

    kind = "quantizer"
    group = "hyperion.quantizers"
    prefix = "quantizer_"
    hooks = specs.QuantizerSpecs
    config_class: ClassVar[type[StrictModel]] = QuantizationConfig
    provides: ClassVar[Provides] = Provides()
    trained_under: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def required(cls) -> tuple[str, ...]:
        asked = {"quantizer_dequantize": cls.provides.dequantize, "quantizer_recognize": bool(cls.provides.reads)}
        return (*super().required(), *(hook for hook, wanted in asked.items() if wanted))


class Scheduler(Plugin):
    """The learning rate over time."""

    kind = "scheduler"
    group = "hyperion.schedulers"
    prefix = "scheduler_"
    hooks = specs.SchedulerSpecs


class Curriculum(Plugin):
    """The order of the data."""

    kind = "curriculum"
    group = "hyperion.curricula"
    prefix = "curriculum_"
    hooks = specs.CurriculumSpecs


class Objective(Plugin):
    """What is learnt from a row."""

    kind = "objective"
    group = "hyperion.objectives"
    prefix = "objective_"
    hooks = specs.ObjectiveSpecs


class Strategy(Plugin):
    """One run on many devices."""

    kind = "strategy"
    group = "hyperion.strategies"
    prefix = "strategy_"
    hooks = specs.StrategySpecs


class DeployTarget(Plugin):
    """Where a packaged model goes."""

    kind = "deploy-target"
    group = "hyperion.deploy_targets"
    prefix = "deploy_"
    hooks = specs.DeploySpecs


class Benchmark(Plugin):
    """How good a model is."""

    kind = "benchmark"
    group = "hyperion.benchmarks"
    prefix = "benchmark_"
    hooks = specs.BenchmarkSpecs


class Tracker(ListedPlugin):
    """Where a run's figures go."""

    kind = "tracker"
    group = "hyperion.trackers"
    prefix = "tracker_"
    hooks = specs.TrackerSpecs


class Safeguard(ListedPlugin):
    """What is let through."""

    kind = "safeguard"
    group = "hyperion.safeguards"
    prefix = "guard_"
    hooks = specs.GuardSpecs


class Observer(ListedPlugin):
    """The life of a run, watched."""

    kind = "observer"
    group = "hyperion.observers"
    prefix = "run_"
    hooks = specs.RunSpecs


KINDS: tuple[type[Plugin], ...] = (
    Adapter,
    Quantizer,
    Scheduler,
    Curriculum,
    Objective,
    Strategy,
    DeployTarget,
    Benchmark,
    Tracker,
    Safeguard,
    Observer,
)
EXPORTS_GROUP = "hyperion.exports"


def kind_named(name: str) -> type[Plugin]:
    """The base class of a kind, by its name ("adapter")."""
    for kind in KINDS:
        if kind.kind == name:
            return kind
    raise KeyError(f"no kind of plugin is called {name!r}; there are: {', '.join(k.kind for k in KINDS)}")


def with_article(kind: str) -> str:
    """ "an adapter", "a quantizer": for sentences about a kind."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
