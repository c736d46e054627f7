"""The torch-free rules for targets are peft's own, tried against what peft itself wraps."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing.tiny import tiny_llama
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from hyperion_peft import Selection, compact, peft_mapping, select

KINDS = {"linear", "embedding"}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "self_attn.o_proj"]},
        {"target_modules": r".*layers\.[12]\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    ],
)
def test_selected_is_what_peft_wraps(options: dict[str, Any]) -> None:
    model = tiny_llama(num_hidden_layers=3)
    facts = live_model_facts(model)
    selected = {module.name for module in select(Selection(**options), facts, KINDS)}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    assert selected == set(wrapped.base_model.targeted_module_names)


def test_compact_names_mean_the_same_modules() -> None:
    facts = live_model_facts(tiny_llama(num_hidden_layers=3))
    linear = [module.name for module in facts.linear()]
    assert compact(linear, facts) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    some = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert {m.name for m in select(Selection(compact(some, facts)), facts, KINDS)} == set(some)


def test_tables_are_read_without_importing_peft() -> None:
    name = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    assert peft_mapping(name) == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert peft_mapping("NO_SUCH_TABLE") == {}
