"""Everything that Hyperion expects of a plugin of this kind, tried on this one."""

from __future__ import annotations

from hyperion_core.testing import SchedulerConformance

pytest_plugins = ["hyperion_core.testing.fixtures"]


class TestChangeme(SchedulerConformance):
    plugin = "changeme"
