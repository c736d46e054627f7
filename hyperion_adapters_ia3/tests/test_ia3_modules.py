"""(IA)³ finds its modules in families that call them differently, and plain peft agrees on the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hyperion_core.errors import CompatibilityError, ConfigError
from hyperion_core.facts import ModelFacts, ModuleFact, Workload
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing.adapters import context
from hyperion_core.testing.tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from hyperion_adapters_ia3 import IA3Adapter, IA3Config

IDS = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(1))
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "llama": (_SIZES, {"k_proj", "v_proj"}, {"down_proj"}),
    "gemma2": (_SIZES | {"head_dim": 16}, {"k_proj", "v_proj"}, {"down_proj"}),
    "phi3": (_SIZES, {"qkv_proj"}, {"down_proj"}),
    "phi": (_SIZES, {"k_proj", "v_proj"}, {"fc2"}),
    "starcoder2": (_SIZES, {"k_proj", "v_proj"}, {"c_proj"}),
    "gpt_neox": (_SIZES, {"query_key_value"}, {"dense_4h_to_h"}),
    "opt": (_SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, {"k_proj", "v_proj"}, {"fc2"}),
    "gpt2": (
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"c_attn"},
        {"mlp.c_proj"},
    ),
    "mpt": ({"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2}, {"Wqkv"}, {"down_proj"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_found_and_merged(family: str, tmp_path: Path) -> None:
    sizes, attention, inner = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    before = model(input_ids=IDS).logits.detach()
    adapter, config = IA3Adapter(), IA3Config()
    facts = live_model_facts(model)
    targets = adapter.resolve(config, facts)
    assert set(targets.names) == attention | inner and set(targets.feedforward_names) == inner

    model = adapter.adapter_apply(model, "default", config, context(tmp_path))
    own = adapter.adapter_param_groups(model, "default", config)[0].parameters
    assert adapter.adapter_estimate(config, facts, Workload(1, 8)).memory["adapter"] == 4 * sum(
        p.numel() for _, p in own
    )
    with torch.no_grad():
        for _, parameter in own:
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    tuned = model(input_ids=IDS).logits.detach()
    merged = {}
    for name in adapter.adapter_targets(config, facts):
        weight, bias = _weight(adapter_base(model, name))
        merged[name] = adapter.adapter_merge_weight(model, "default", name, weight, bias)
    model = adapter.adapter_unload(model, "default")
    assert torch.equal(model(input_ids=IDS).logits, before)
    for name, (weight, bias) in merged.items():
        module = model.get_submodule(name)
        module.weight.data = weight.T.contiguous() if hasattr(module, "nf") else weight
        if bias is not None:
            module.bias.data = bias
    torch.testing.assert_close(model(input_ids=IDS).logits, tuned, rtol=1e-5, atol=1e-5)


def adapter_base(model: Any, name: str) -> Any:
    return model.get_base_model().get_submodule(name).get_base_layer()


def _weight(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = module.weight.data
    bias = None if module.bias is None else module.bias.data
    return (weight.T.contiguous() if hasattr(module, "nf") else weight), bias


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"], "init_ia3_weights": False},
        {"exclude_modules": ["v_proj"]},
    ],
)
def test_plain_peft_loads_it_and_the_other_way_round(options: dict[str, Any], tmp_path: Path) -> None:
    adapter, ctx, config = IA3Adapter(), context(tmp_path), IA3Config(**options)
    model = adapter.adapter_apply(tiny_llama(), "default", config, ctx)
    with torch.no_grad():
        for _, parameter in adapter.adapter_param_groups(model, "default", config)[0].parameters:
            parameter.mul_(1.5)
    tuned = model(input_ids=IDS).logits
    adapter.adapter_save(model, "default", config, tmp_path / "ours", False)
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert torch.equal(plain(input_ids=IDS).logits, tuned)
    plain.save_pretrained(tmp_path / "theirs")
    again = adapter.adapter_load(tiny_llama(), "another", tmp_path / "theirs", True, ctx)
    assert torch.equal(again(input_ids=IDS).logits, tuned)


def test_it_has_no_strength_and_no_new_tokens(tmp_path: Path) -> None:
    from dataclasses import replace

    adapter, ctx = IA3Adapter(), context(tmp_path)
    with pytest.raises(CompatibilityError, match="cannot train new tokens"):
        adapter.adapter_apply(tiny_llama(), "default", IA3Config(), replace(ctx, new_token_ids=(3,)))
    model = adapter.adapter_apply(tiny_llama(), "default", IA3Config(), ctx)
    with pytest.raises(CompatibilityError, match=r"cannot act with strength 0\.5"):
        adapter.adapter_activate(model, {"default": 0.5})


def test_it_works_on_a_bf16_base(tmp_path: Path) -> None:
    adapter, config = IA3Adapter(), IA3Config()
    model = adapter.adapter_apply(tiny_llama().bfloat16(), "default", config, context(tmp_path))
    own = adapter.adapter_param_groups(model, "default", config)[0].parameters
    assert {p.dtype for _, p in own} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in own)


def test_modules_that_nothing_shows_are_asked_for() -> None:
    facts = ModelFacts("org/odd", "odd", (ModuleFact("net.0.a", "linear", (8, 8)),), hidden_size=8, layers=1)
    (problem,) = IA3Adapter().adapter_check(IA3Config(), facts, None)
    assert "feedforward_modules" in problem.fix and "a" in problem.why
    assert IA3Adapter().adapter_targets(IA3Config(target_modules=["a"]), facts) == ["net.0.a"]


@pytest.mark.parametrize(
    "options, path",
    [
        ({"feedforward_modules": ["down_proj"]}, "feedforward_modules"),
        ({"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, "feedforward_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_modules": "k_(proj"}, "target_modules"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        IA3Config(**options)
    assert path in {problem.path for problem in caught.value.problems}
