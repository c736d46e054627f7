"""LoRA keeps the contract, in the forms that change its tensors."""

from __future__ import annotations

from hyperion_core.testing import AdapterConformance


class TestLora(AdapterConformance):
    plugin = "lora"


class TestDora(AdapterConformance):
    plugin = "lora"
    options = {"use_dora": True, "target_modules": "all-linear", "r": 4}  # noqa: RUF012 - as the suite declares it


class TestWithAWholeModule(AdapterConformance):
    plugin = "lora"
    options = {"modules_to_save": ["lm_head"], "use_rslora": True}  # noqa: RUF012
