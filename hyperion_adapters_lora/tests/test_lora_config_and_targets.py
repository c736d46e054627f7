"""Configs that are refused, and targets that do not exist, in words that help. No weights are needed for any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import CompatibilityError, ConfigError
from hyperion_core.facts import ModelFacts, ModuleFact, Provides

from hyperion_adapters_lora import LoraAdapter, LoraConfig

_LAYER = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.up_proj": (16, 8),
    "mlp.down_proj": (8, 16),
}


def facts(model_type: str = "llama", tied: bool = True) -> ModelFacts:
    modules = [ModuleFact("model.embed_tokens", "embedding", (50, 8))]
    for layer in range(2):
        modules += [ModuleFact(f"model.layers.{layer}.{n}", "linear", shape) for n, shape in _LAYER.items()]
        modules.append(ModuleFact(f"model.layers.{layer}.input_layernorm", "norm", (8,)))
    modules.append(ModuleFact("model.norm", "norm", (8,)))
    if not tied:
        modules.append(ModuleFact("lm_head", "linear", (50, 8)))
    return ModelFacts("org/model", model_type, tuple(modules), 8, 2, 50, tied_embeddings=tied)


@pytest.mark.parametrize(
    "options, path, words",
    [
        ({"init_lora_weights": "loftq"}, "init_lora_weights", "must stay as it is"),
        ({"init_lora_weights": "corda"}, "init_lora_weights", "start from data too"),
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights", "no test here covers it"),
        ({"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias", "no test here covers it"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, "eva_config", "ranks stay as configured"),
        ({"init_rows": 4}, "init_rows", "looks at no data"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio", "1.0 or more"),
        ({"init_lora_weights": "orthogonal", "r": 5}, "init_lora_weights", "r is 5"),
        ({"layer_replication": [[0, 1]]}, "layer_replication", "changes the base"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices", "new_tokens"),
        ({"target_modules": []}, "target_modules", "empty"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "layers_to_transform", "as a list"),
        ({"layers_pattern": "h"}, "layers_pattern", "layers_to_transform"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias", "use_dora"),
        ({"r": 0}, "r", "greater than 0"),
        ({"lora_dropout": 1.0}, "lora_dropout", "less than 1"),
        ({"lora_alpha": -1}, "lora_alpha", "greater than 0"),
        ({"bias": "some"}, "bias", "lora_only"),
        ({"task_type": "SEQ_CLS"}, "task_type", "CAUSAL_LM"),
        ({"lora_alhpa": 3}, "lora_alhpa", "lora_alpha"),
        ({"target_modules": "q_(proj"}, "target_modules", "unterminated subpattern"),
        ({"exclude_modules": "*proj"}, "exclude_modules", "nothing to repeat"),
        ({"rank_pattern": {"q_(proj": 4}}, "rank_pattern", "unterminated subpattern"),
        ({"alpha_pattern": {"[q": 4}}, "alpha_pattern", "unterminated character set"),
        ({"layers_pattern": ["layers["], "layers_to_transform": 1}, "layers_pattern", "unterminated character set"),
        ({"modules_to_save": ["norm("]}, "modules_to_save", "unterminated subpattern"),
    ],
)
def test_an_impossible_option_is_refused_with_its_reason(options: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**options)
    found = [problem for problem in caught.value.problems if problem.path == path]
    assert any(words in str(problem) for problem in found), caught.value


@pytest.mark.parametrize(
    "options, path, words",
    [
        ({"target_modules": ["q_prj", "v_proj"]}, "target_modules", 'did you mean "q_proj" for "q_prj"'),
        ({"target_modules": ["query"]}, "target_modules", "q_proj, k_proj, v_proj, o_proj, up_proj, down_proj"),
        ({"target_modules": ["lm_head"]}, "target_modules", "shares the embedding's weight"),
        ({"target_modules": ".*query"}, "target_modules", "matches no module"),
        ({"target_modules": ".*mlp.*"}, "target_modules", "model.layers.0.mlp"),
        ({"target_modules": ["norm"]}, "target_modules", "cannot wrap"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, "target_modules", "left out by"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 7}, "target_modules", "layers_to_transform"),
        ({"modules_to_save": ["head"]}, "modules_to_save", "no module called 'head'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save", "shares its weight"),
    ],
)
def test_targets_that_are_not_there_are_named_beside_those_that_are(
    options: dict[str, Any], path: str, words: str
) -> None:
    (problem,) = LoraAdapter().adapter_check(LoraConfig(**options), facts(), None)
    assert problem.path == path and words in str(problem) and problem.fix
    with pytest.raises(CompatibilityError) as caught:
        LoraAdapter().adapter_targets(LoraConfig(**options), facts())
    assert caught.value.what == problem.what


def test_on_a_live_model_the_same_error(tmp_path: Path) -> None:
    from hyperion_core.testing.adapters import context
    from hyperion_core.testing.tiny import tiny_llama

    config, unknown = LoraConfig(target_modules=["query"]), ModelFacts("org/model", why_unknown="not local")
    assert LoraAdapter().adapter_check(config, unknown, None) == []
    assert LoraAdapter().adapter_targets(config, unknown) == []
    with pytest.raises(CompatibilityError, match="no module called 'query'") as caught:
        LoraAdapter().adapter_apply(tiny_llama(), "default", config, context(tmp_path))
    assert "q_proj" in caught.value.why


@pytest.mark.parametrize("model_type, expected", [("llama", {"q_proj", "v_proj"}), ("something-new", set())])
def test_without_targets_pefts_choice_or_every_linear_module(model_type: str, expected: set[str]) -> None:
    targets = LoraAdapter().adapter_targets(LoraConfig(), facts(model_type, tied=False))
    short = {name.rpartition(".")[2] for name in targets}
    assert short == (expected or {name.rpartition(".")[2] for name in _LAYER})


def test_dora_asks_for_weights_that_some_quantizers_do_not_give() -> None:
    (problem,) = LoraAdapter().adapter_check(LoraConfig(use_dora=True), facts(), Provides(trainable=True))
    assert problem.path == "use_dora" and "full precision" in problem.why
    assert LoraAdapter().adapter_check(LoraConfig(use_dora=True), facts(), Provides(dequantize=True)) == []
