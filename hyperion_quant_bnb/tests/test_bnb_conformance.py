"""The bitsandbytes quantizer keeps the contract, in each of its forms."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.testing import QuantizerConformance
from hyperion_core.testing.quantizer_trial import Trial


class FourBitOptions(Trial):
    """The suite's options are for 4 bits: the plugin refuses them with 8."""

    def config(self, plan: Any) -> Any:
        return super().config(plan) if plan.bits == 4 else self.plugin.config_class.parse({"bits": plan.bits})


class FourBits(FourBitOptions):
    widths = (4,)  # type: ignore[assignment]


class TestDefaults(QuantizerConformance):
    """nf4 in blocks of 64 with quantized scales, and 8 bits."""

    plugin = "bnb"


class FourBitSuite(QuantizerConformance):
    plugin = "bnb"
    __test__ = False

    def on_trial(self, plugin_class: Any, folder: Path) -> Trial:
        return as_a(FourBitOptions, super().on_trial(plugin_class, folder))

    def test_what_it_saved_it_recognizes(self, trial: Trial, tmp_path: Path) -> None:
        super().test_what_it_saved_it_recognizes(as_a(FourBits, trial), tmp_path)


def as_a(kind: type[Trial], trial: Trial) -> Trial:
    return kind(*(getattr(trial, field.name) for field in fields(trial)))


class TestFp4WithPlainScales(FourBitSuite):
    __test__ = True
    options = {"quant_type": "fp4", "double_quant": False}  # noqa: RUF012 - as the suite declares it


class TestTheSpecificationsTriple(FourBitSuite):
    __test__ = True
    options = {"bits": 4, "group_size": 128, "double_quant": True}  # noqa: RUF012


class TestBlocksThatRunOverTheEndsOfRows(FourBitSuite):
    """Rows of 96 and 160 weights in blocks of 64, where bitsandbytes' own CPU kernel goes wrong."""

    __test__ = True
    options = {"quant_type": "nf4"}  # noqa: RUF012

    def save_base(self, folder: Path) -> Path:
        from hyperion_core.testing.tiny import save_tiny_base

        return save_tiny_base(folder, hidden_size=96, intermediate_size=160)


@pytest.mark.gpu
class TestOnAGpu(QuantizerConformance):
    """8-bit products come back in float16 there, so equal numbers are equal to its precision only."""

    plugin = "bnb"
    device = "cuda"
    tolerance = 1e-3
