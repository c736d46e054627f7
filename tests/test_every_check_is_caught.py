"""Every check of every conformance suite has a plugin, broken on purpose, that it fails and whose fault it names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import hyperion_core.testing
import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]

#: Where each suite's broken plugins are: `BROKEN` lists (plugin, name of the check, what its message must match),
#: and the tests beside it run each of them.
CATCHES = {
    "AdapterConformance": "hyperion_core/tests/test_adapter_conformance_catches.py",
    "DeployTargetConformance": "hyperion_core/tests/test_deploy_conformance_catches.py",
    "PluginConformance": "hyperion_core/tests/test_plugin_conformance_catches.py",
    "QuantizerConformance": "tests/test_quantizer_conformance_catches.py",
    "SchedulerConformance": "hyperion_core/tests/test_scheduler_conformance_catches.py",
}


def catches(suite: str) -> ModuleType:
    path = ROOT / CATCHES[suite]
    spec = importlib.util.spec_from_file_location(f"catches_of_{suite}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checks(suite: str) -> set[str]:
    """The checks that a suite adds to those that it inherits."""
    return {name for name in vars(getattr(hyperion_core.testing, suite)) if name.startswith("test_")}


def test_every_suite_has_its_catches() -> None:
    suites = {name for name in hyperion_core.testing.__all__ if name.endswith("Conformance")}
    assert set(CATCHES) == suites == set(hyperion_core.testing.__all__)
    for suite in suites - {"PluginConformance"}:
        bases = getattr(hyperion_core.testing, suite).__mro__[1:]
        inherited = {name for base in bases for name in vars(base) if name.startswith("test_")}
        assert inherited == checks("PluginConformance"), f"{suite} inherits checks that no other suite lists"


@pytest.mark.parametrize("suite", sorted(CATCHES))
def test_every_check_of_a_suite_has_a_broken_plugin(suite: str) -> None:
    module = catches(suite)
    caught = {test for _, test, *_ in module.BROKEN}
    assert checks(suite) - caught == set(), "checks that no broken plugin is known to fail"
    assert caught - checks(suite) == set(), "catches of checks that the suite does not have"
    source = (ROOT / CATCHES[suite]).read_text(encoding="utf-8")
    assert re.search(r"parametrize\([^)]*\bBROKEN\b", source), "the broken plugins are listed, and no test runs them"
    for broken, test, message in module.BROKEN:
        assert len(message.split()) >= 3, f"{broken} fails {test} with a message that is not looked at: {message!r}"
