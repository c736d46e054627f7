"""Everything that Hyperion expects of a quantizer, tried on this one."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hyperion_core.testing import QuantizerConformance


class TestTorchao(QuantizerConformance):
    plugin = "torchao"


class TestTorchaoWithZeroPoints(QuantizerConformance):
    plugin = "torchao"
    options: ClassVar[dict[str, Any]] = {"sym": False}


@pytest.mark.gpu
class TestTorchaoOnCuda(QuantizerConformance):
    plugin = "torchao"
    device = "cuda"
