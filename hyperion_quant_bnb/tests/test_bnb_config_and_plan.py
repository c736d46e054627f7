"""Options that cannot be had are refused before anything is loaded, each with what could be had."""

from __future__ import annotations

from typing import Any

import pytest
from hyperion_core.errors import ConfigError
from hyperion_core.facts import BitPlan, ModelFacts, ModuleFact

from hyperion_quant_bnb import BnbConfig, BnbQuantizer

NAMES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("q_proj", "up")]
FACTS = ModelFacts("some/model", modules=tuple(ModuleFact(n, "linear", (576, 576)) for n in [*NAMES, "lm_head"]))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"group_size": 48}, "32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ({"bits": 8, "group_size": 64}, "each row of a weight has one scale"),
        ({"bits": 8, "double_quant": True}, "double_quant"),
        ({"bits": 8, "quant_type": "fp4"}, "quant_type"),
        ({"bits": 8, "compute_dtype": "float16"}, "compute_dtype"),
        ({"quant_type": "nf3"}, "quant_type"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BnbConfig.parse(options)
    assert named in str(caught.value)


def test_options_that_ask_for_nothing_stand_beside_8_bits() -> None:
    config = BnbConfig.parse({"bits": 8, "double_quant": False, "compute_dtype": "auto"})
    assert BnbConfig.parse(config.model_dump()) == config


def problems(plan: BitPlan, facts: ModelFacts = FACTS, **options: Any) -> str:
    found = BnbQuantizer().quantizer_check(BnbConfig(**options), facts, plan, "cpu")
    return "\n".join(map(str, found))


def test_names_that_no_module_has_are_refused() -> None:
    assert "skip_modules.1" in problems(BitPlan(4, 0), skip_modules=["up", "q_porj"])
    assert 'did you mean "q_proj"' in problems(BitPlan(4, 0), skip_modules=["q_porj"])
    assert '"lm_head" is not quantized anyway' in problems(BitPlan(4, 0), skip_modules=["lm_head"])
    assert "nothing would be quantized" in problems(BitPlan(4, 0), skip_modules=["q_proj", "up"])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_module_that_is_used_without_being_called_must_be_left_out(bits: int) -> None:
    names = [f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "dt_proj")]
    mamba = ModelFacts("some/mamba", modules=tuple(ModuleFact(name, "linear", (576, 576)) for name in names))
    found = problems(BitPlan(bits, 0), mamba)
    assert f"dt_proj cannot be held in {bits} bits" in found and 'skip_modules: ["dt_proj"]' in found
    assert not problems(BitPlan(bits, 0), mamba, skip_modules=["dt_proj"])
    assert not problems(BitPlan(bits, 0, {"*.dt_proj": (16, 0)}), mamba)


def test_a_plan_may_leave_modules_out_but_not_mix_4_and_8_bits() -> None:
    assert not problems(BitPlan(4, 128, {"*.up": (16, 0)}))
    assert "4 bits or in 8" in problems(BitPlan(4, 0, {"*.up": (8, 0)}))
    assert "group_size" in problems(BitPlan(8, 64)), "the plan's bits count, not the config's"
    assert "double_quant" in problems(BitPlan(8, 0), double_quant=True)
    assert "16 bits quantize nothing" in problems(BitPlan(16, 0))
    assert "blocks of 48" in problems(BitPlan(4, 48))
