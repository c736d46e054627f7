"""Which quantizer is taken where the config names none, and what is said of it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import ConfigError
from hyperion_core.facts import Provides
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import Registry

from hyperion import FinetuneConfig
from hyperion_adapters_lora import LoraAdapter
from hyperion_objective_sft import SftObjective
from hyperion_schedulers import Cosine


def quantizer(*bits: int, calibration: bool = False, per_module: bool = False, knows: str = "") -> type[Quantizer]:
    class Options(QuantizationConfig):
        understood: ClassVar[frozenset[str]] = frozenset(knows.split())

    class Made(Quantizer):
        config_class = Options
        provides = Provides(frozenset(bits), per_module, True, frozenset({"cpu"}), calibration=calibration)

        def quantizer_estimate(self): ...
        def quantizer_load_kwargs(self): ...
        def quantizer_after_load(self): ...
        def quantizer_modules(self): ...
        def quantizer_save(self): ...

    return Made


@pytest.fixture
def installed(registry: Registry) -> Registry:
    for plugin, name in ((LoraAdapter, "lora"), (SftObjective, "sft"), (Cosine, "cosine")):
        registry.add(plugin, name)
    return registry


@pytest.fixture
def three(installed: Registry) -> None:
    installed.add(quantizer(4, 8, knows="group_size double_quant"), "pairs")
    installed.add(quantizer(2, 3, 4, 8, calibration=True, per_module=True, knows="group_size"), "measures")
    installed.add(quantizer(2, 3, 4, 5, 6, 7, 8, per_module=True, knows="group_size"), "any")


def chosen(**options: Any) -> QuantizationConfig:
    config = FinetuneConfig(base_model="owner/model", adapter="lora", quantization=options)
    assert config.quantization is not None
    return config.quantization


@pytest.mark.parametrize(
    "options, method, why",
    [
        ({"bits": 4, "group_size": 128, "double_quant": True}, "pairs", 'not any: "double_quant" means nothing'),
        ({"bits": 4}, "pairs", "it is made for 4, 8 bits; any and measures could do this too"),
        ({"bits": 3}, "any", "it needs no calibration data; measures could do this too"),
        ({"bits": 7}, "any", "not measures: it holds weights in 2, 3, 4, 8 bits"),
        ({"bits": 4, "calibration": {"rows": 8}}, "measures", "it measures on data; any and pairs could do this too"),
        ({"bits": "auto", "target_bits": 3}, "any", "it needs no calibration data; measures could do this too"),
    ],
)
def test_one_is_taken_that_can_do_it(three: None, options: dict[str, Any], method: str, why: str) -> None:
    found = chosen(**options)
    assert found.method == method
    assert why in found.why_chosen


def test_one_that_is_named_was_not_chosen(three: None) -> None:
    assert chosen(method="any", bits=4).why_chosen == ""


def test_the_reason_outlives_a_change_of_the_config(three: None) -> None:
    config = FinetuneConfig(base_model="owner/model", adapter="lora", quantization={"bits": 3})
    again = config.replace(training={"seed": 1}).quantization
    assert again is not None and again.why_chosen == config.quantization.why_chosen != ""


def test_where_none_can_do_it_each_says_why_not(three: None) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(bits=3, double_quant=True)
    text = str(caught.value)
    assert "quantization: no installed quantizer does what these options ask for" in text
    assert "pairs: it holds weights in 4, 8 bits" in text and 'any: "double_quant" means nothing' in text


def test_one_that_is_alone_is_taken_and_says_itself_what_it_cannot_do(installed: Registry) -> None:
    installed.add(quantizer(4, 8, knows="group_size"), "pairs")
    assert chosen(bits=8, group_size=64).method == "pairs"
    with pytest.raises(ConfigError, match=r'quantization\.double_quant: "double_quant" means nothing to this method'):
        chosen(double_quant=True)


def test_without_any_it_says_how_to_get_one(installed: Registry) -> None:
    with pytest.raises(ConfigError, match=r'python -m pip install "hyperion-ft\[bnb\]"'):
        chosen(bits=4)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"bits": "auto"}, "quantization.bits: bits: auto has no budget"),
        ({"bits": "auto", "target_bits": 3, "budget_mb": 90}, "quantization.bits: bits: auto has two budgets"),
        ({"bits": 4, "target_bits": 3.5}, 'quantization.target_bits: "target_bits" needs bits: auto'),
        ({"bits": 4, "bit_plan": "plan.json"}, 'quantization.bits: "bits" stands beside bit_plan'),
        ({"group_size": 32, "bit_plan": "plan.json"}, 'quantization.group_size: "group_size" stands beside bit_plan'),
        ({"bits": 17}, "quantization.bits: 17 is refused"),
        ({"bits": "all"}, "quantization.bits: 'all' is refused"),
        ({"calibration": {"row": 8}}, 'did you mean "rows"?'),
    ],
)
def test_options_that_contradict_each_other_are_refused(three: None, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(method="any", **options)
    assert says in str(caught.value)
