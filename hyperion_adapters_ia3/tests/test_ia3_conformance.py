"""(IA)³ keeps the contract."""

from __future__ import annotations

from hyperion_core.testing import AdapterConformance


class TestIA3(AdapterConformance):
    plugin = "ia3"
    random_start = False
