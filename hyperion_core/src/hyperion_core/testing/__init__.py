"""The conformance kit: a plugin's test inherits a suite in two lines, and proves that it keeps the contract.

    from hyperion_core.testing import SchedulerConformance

    class TestCosine(SchedulerConformance):
        plugin = "cosine"

Fixtures: `pytest_plugins = ["hyperion_core.testing.fixtures"]`. This package needs pytest; importing it does not
import torch, the suites do so when they run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdapterConformance as AdapterConformance
    from .deploy_targets import DeployTargetConformance as DeployTargetConformance
    from .plugins import PluginConformance as PluginConformance
    from .quantizers import QuantizerConformance as QuantizerConformance
    from .schedulers import SchedulerConformance as SchedulerConformance

_HOMES = {
    "AdapterConformance": "adapters",
    "DeployTargetConformance": "deploy_targets",
    "PluginConformance": "plugins",
    "QuantizerConformance": "quantizers",
    "SchedulerConformance": "schedulers",
}
__all__ = [
    "AdapterConformance",
    "DeployTargetConformance",
    "PluginConformance",
    "QuantizerConformance",
    "SchedulerConformance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
