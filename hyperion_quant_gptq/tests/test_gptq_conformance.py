"""Everything that Hyperion expects of a quantizer, tried on this one."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hyperion_core.testing import QuantizerConformance


@pytest.mark.slow
class TestGptq(QuantizerConformance):
    plugin = "gptq"


@pytest.mark.slow
class TestGptqWithZeroPointsAndOrder(QuantizerConformance):
    plugin = "gptq"
    options: ClassVar[dict[str, Any]] = {"sym": False, "desc_act": True}


@pytest.mark.gpu
class TestGptqOnCuda(QuantizerConformance):
    plugin = "gptq"
    device = "cuda"
