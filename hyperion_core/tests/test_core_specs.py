"""The page of hooks is consistent with the kinds, and light."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from hyperion_core import specs
from hyperion_core.facts import Capabilities, Provides
from hyperion_core.kinds import EXPORTS_GROUP, KINDS, Adapter, Quantizer, kind_named, with_article
from hyperion_core.specs import ALL_SPECS, hook_names, required_hooks

STARS = {
    "AdapterSpecs": "targets estimate apply param_groups activate save load unload",
    "QuantizerSpecs": "estimate load_kwargs after_load modules save",
    "SchedulerSpecs": "build",
    "CurriculumSpecs": "order",
    "ObjectiveSpecs": "sequences loss",
    "StrategySpecs": "estimate setup in_force gather",
    "DeploySpecs": "render apply status delete",
    "BenchmarkSpecs": "tasks run",
    "TrackerSpecs": "start log",
    "GuardSpecs": "",
    "RunSpecs": "",
}


def hooks_of(page):
    return [(name, getattr(page, name)) for name in hook_names(page)]


@pytest.mark.parametrize("page", ALL_SPECS, ids=lambda page: page.__name__)
def test_every_hook_bears_its_kinds_prefix_and_is_documented_and_typed(page):
    (kind,) = [kind for kind in KINDS if kind.hooks is page]
    for name, hook in hooks_of(page):
        assert name.startswith(kind.prefix)
        assert hook.__doc__, f"{name} is not documented"
        signature = inspect.signature(hook)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in list(signature.parameters.values())[1:]:
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name}) has no type"
            assert parameter.default is inspect.Parameter.empty, f"{name}: pluggy passes every argument by name"


@pytest.mark.parametrize("page", ALL_SPECS, ids=lambda page: page.__name__)
def test_the_stars_are_where_plugin_authors_rely_on_them(page):
    (kind,) = [kind for kind in KINDS if kind.hooks is page]
    assert [hook.removeprefix(kind.prefix) for hook in required_hooks(page)] == STARS[page.__name__].split()
    stray = [name for name, hook in hooks_of(page) if "★" in hook.__doc__ and name not in required_hooks(page)]
    assert not stray, f"a star that does not stand first counts for nothing: {stray}"


@pytest.mark.parametrize("page", ALL_SPECS, ids=lambda page: page.__name__)
def test_drivers_answer_with_one_value_and_lists_with_all(page):
    (kind,) = [kind for kind in KINDS if kind.hooks is page]
    one = kind.kind not in {"benchmark", "tracker", "safeguard", "observer"}
    for _, hook in hooks_of(page):
        assert bool(getattr(hook, f"{specs.PROJECT}_spec")["firstresult"]) is one


def test_kinds_do_not_overlap():
    for attribute in ("kind", "group", "prefix", "hooks"):
        assert len({getattr(kind, attribute) for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        others = [other.prefix for other in KINDS if other is not kind]
        assert not any(kind.prefix.startswith(prefix) for prefix in others)
        assert kind.group.startswith("hyperion.") and kind.group != EXPORTS_GROUP
        assert kind_named(kind.kind) is kind
    with pytest.raises(KeyError, match="there are: adapter, quantizer"):
        kind_named("adaptor")
    assert (with_article("adapter"), with_article("quantizer")) == ("an adapter", "a quantizer")


def test_a_capability_asks_for_its_hook():
    class Merging(Adapter):
        capabilities = Capabilities(mergeable=True)

    class Open(Quantizer):
        provides = Provides(dequantize=True)

    assert set(Merging.required()) - set(Adapter.required()) == {"adapter_merge_weight"}
    assert set(Open.required()) - set(Quantizer.required()) == {"quantizer_dequantize"}
    everything = Capabilities(per_token=True, mergeable=True, combinable=True)
    all_of_it = type("All", (Adapter,), {"capabilities": everything})
    assert {"adapter_route", "adapter_merge_weight", "adapter_combine"} <= set(all_of_it.required())


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_no_part_of_the_core_imports_anything_heavy():
    code = """if True:
        import importlib, pkgutil, hyperion_core
        for module in pkgutil.iter_modules(hyperion_core.__path__):
            importlib.import_module(f"hyperion_core.{module.name}")
        from hyperion_core.testing import SchedulerConformance
        import hyperion_core.testing.fixtures
    """
    loaded = modules_after(code)
    assert "hyperion_core" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "numpy", "accelerate", "hyperion"}


def test_the_registry_alone_does_not_bring_the_test_kit():
    assert not modules_after("import hyperion_core.registry") & {"pytest", "_pytest", "numpy", "torch"}
