"""The quantizer suite passes the template's quantizer, and names the fault of each that is broken on purpose."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import Registry
from hyperion_core.testing import QuantizerConformance

pytest.importorskip("torch")
pytest.importorskip("transformers")

from broken_quantizers import memory, planning, use

from hyperion.plugin_templates.quantizer.plugin import ChangemeQuantizer


class TestTheTemplate(QuantizerConformance):
    plugin = "changeme"

    @pytest.fixture(autouse=True)
    def _registered(self, registry: Registry) -> None:
        registry.add(ChangemeQuantizer, "changeme")


BROKEN = [*planning.BROKEN, *memory.BROKEN, *use.BROKEN]


@pytest.mark.parametrize("broken, test, message", BROKEN, ids=[f"{b.__name__}-{t}" for b, t, _ in BROKEN])
def test_a_broken_quantizer_is_caught(broken: type[Quantizer], test: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s){message}"):
        check(broken, test, tmp_path)


def check(broken: type[Quantizer], test: str, folder: Path) -> None:
    """One check of the suite, as pytest would run it on the broken plugin."""
    suite = TestTheTemplate()
    method = getattr(suite, test)
    available = {"plugin_class": broken, "tmp_path": folder, "trial": suite.on_trial(broken, folder)}
    try:
        method(**{name: available[name] for name in inspect.signature(method).parameters})
    except pytest.skip.Exception as skipped:
        raise RuntimeError("the check skips what it should refuse") from skipped
