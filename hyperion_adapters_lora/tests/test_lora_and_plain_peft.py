"""What is trained here, plain peft loads with equal logits, and the other way round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hyperion_core.errors import ArtifactError, CompatibilityError
from hyperion_core.facts import Workload
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing.adapters import context
from hyperion_core.testing.tiny import tiny_llama
from safetensors.torch import load_file, save_file

from hyperion_adapters_lora import LoraAdapter, LoraConfig

IDS = torch.randint(0, 200, (3, 10), generator=torch.Generator().manual_seed(1))
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora on all-linear": {"use_rslora": True, "target_modules": "all-linear"},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora on the embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    "regular expression": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*v_proj": 32}},
    "biases of the wrapped": {"bias": "lora_only"},
    "all biases": {"bias": "all", "lora_bias": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def base(**overrides: Any) -> Any:
    return tiny_llama(attention_bias=True, **overrides)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model: Any, config: LoraConfig, name: str = "default") -> Any:
    """After three steps in which every tensor moves."""
    parameters = [p for g in LoraAdapter().adapter_param_groups(model, name, config) for _, p in g.parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    adapter, ctx, config = LoraAdapter(), context(tmp_path), LoraConfig(**options)
    facts = live_model_facts(base())
    model = adapter.adapter_apply(base(), "mine", config, ctx)
    (group,) = adapter.adapter_param_groups(model, "mine", config)
    planned = adapter.adapter_estimate(config, facts, Workload(1, 8)).memory["adapter"]
    assert planned == 4 * sum(p.numel() for _, p in group.parameters)
    tuned = logits(trained(model, config, "mine"))
    assert not torch.equal(tuned, logits(base()))

    adapter.adapter_save(model, "mine", config, tmp_path / "ours", False)
    plain = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert torch.equal(logits(plain), tuned)

    plain.save_pretrained(tmp_path / "theirs")
    again = adapter.adapter_load(base(), "layers", tmp_path / "theirs", True, ctx)
    assert torch.equal(logits(again), tuned)

    adapter.adapter_activate(model, {})
    assert torch.equal(logits(model), logits(base()))
    bare = adapter.adapter_unload(again, "layers")
    assert all(torch.equal(value, bare.state_dict()[key]) for key, value in base().state_dict().items())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "all biases"])
def test_merged_equals_unmerged(form: str, tmp_path: Path) -> None:
    adapter, config = LoraAdapter(), LoraConfig(**FORMS[form])
    model = trained(adapter.adapter_apply(base(), "default", config, context(tmp_path)), config)
    merged = base()
    for name in adapter.adapter_targets(config, live_model_facts(base())):
        module = merged.get_submodule(name)
        bias = getattr(module, "bias", None)
        weight, bias = adapter.adapter_merge_weight(
            model, "default", name, module.weight.data, None if bias is None else bias.data
        )
        module.weight.data = weight
        if bias is not None:
            module.bias.data = bias
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_what_has_no_place_in_a_merged_module_is_refused(tmp_path: Path) -> None:
    adapter, ctx = LoraAdapter(), context(tmp_path)
    config = LoraConfig(lora_bias=True, target_modules=["o_proj"])
    model = adapter.adapter_apply(tiny_llama(), "default", config, ctx)
    weight = torch.zeros(32, 32)
    with pytest.raises(CompatibilityError, match="cannot be merged"):
        adapter.adapter_merge_weight(model, "default", "model.layers.0.self_attn.o_proj", weight, None)
    model = adapter.adapter_apply(base(mlp_bias=True), "default", LoraConfig(bias="all"), ctx)
    with pytest.raises(CompatibilityError, match="module by module"):
        adapter.adapter_merge_weight(model, "default", "model.layers.0.self_attn.q_proj", weight, weight[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_train_alone_are_saved_and_reload(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    def fresh() -> Any:
        return base(tie_word_embeddings=tied).to(dtype)

    rows = tuple(sorted(IDS[0, 1:4].tolist()))  # tokens that are read, and followed by another
    adapter, config = LoraAdapter(), LoraConfig()
    ctx = replace(context(tmp_path), new_token_ids=rows)
    model = adapter.adapter_apply(fresh(), "default", config, ctx)
    own = {n: p for n, p in adapter.adapter_param_groups(model, "default", config)[0].parameters if "token" in n}
    assert [tuple(p.shape) for p in own.values()] == [(3, 32)] * (1 if tied else 2)
    tuned = logits(trained(model, config))
    adapter.adapter_save(model, "default", config, tmp_path / "a", False)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh(), tmp_path / "a")), tuned)
    assert torch.equal(logits(adapter.adapter_load(fresh(), "default", tmp_path / "a", True, ctx)), tuned)
    for name in ("model.embed_tokens", "lm_head"):
        before = fresh().get_submodule(name).weight.data.float()
        after, _ = adapter.adapter_merge_weight(model, "default", name, before, None)
        changed = (after != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == list(rows)
    adapter.adapter_unload(model, "default")


def test_it_trains_in_fp32_over_a_bf16_base(tmp_path: Path) -> None:
    adapter, config = LoraAdapter(), LoraConfig(modules_to_save=["lm_head", "norm"], use_dora=True)
    model = adapter.adapter_apply(base().bfloat16(), "default", config, context(tmp_path))
    own = adapter.adapter_param_groups(model, "default", config)[0].parameters
    assert {p.dtype for _, p in own} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    adapter.adapter_save(trained(model, config), "default", config, tmp_path / "a", False)
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.float32}


def test_strength_multiplies_the_update_and_adapters_add_up(tmp_path: Path) -> None:
    adapter, ctx, config = LoraAdapter(), context(tmp_path), LoraConfig(target_modules=["lm_head"])
    model = trained(adapter.adapter_apply(base(), "one", config, ctx), config, "one")
    model = adapter.adapter_apply(model, "two", config, replace(ctx, seed=2))
    trained(model, config, "two")
    plain = logits(base())
    effect = {}
    for name in ("one", "two"):
        adapter.adapter_activate(model, {name: 1.0})
        effect[name] = logits(model) - plain
    adapter.adapter_activate(model, {"one": 0.25, "two": -2.0})
    torch.testing.assert_close(logits(model) - plain, 0.25 * effect["one"] - 2 * effect["two"], rtol=1e-4, atol=1e-5)
    with pytest.raises(CompatibilityError, match="no adapter called") as caught:
        adapter.adapter_activate(model, {"three": 1.0})
    assert '"one" (LORA), "two" (LORA)' in caught.value.why


def test_another_method_cannot_join(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(CompatibilityError, match="cannot join") as caught:
        LoraAdapter().adapter_apply(model, "mine", LoraConfig(), context(tmp_path))
    assert "one method" in caught.value.why


def test_the_recorded_base_is_the_name_that_was_written(tmp_path: Path) -> None:
    adapter, ctx = LoraAdapter(), context(tmp_path)
    for written, recorded in (("org/model", "org/model"), (str(tmp_path / "cache" / "model"), None)):
        plan = replace(ctx.plan, config={"base_model": written})
        model = adapter.adapter_apply(base(), "default", LoraConfig(), replace(ctx, plan=plan))
        adapter.adapter_save(model, "default", LoraConfig(), tmp_path / "a", False)
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == recorded
        assert str(tmp_path) not in (tmp_path / "a" / "adapter_config.json").read_text()


def _spoil(folder: Path, what: str) -> None:
    weights, options = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(options.read_text())
    first = min(tensors)
    if what == "missing":
        del tensors[first]
    elif what == "unknown":
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.zeros(2)
    elif what == "shape":
        tensors[first] = torch.zeros(2, 2)
    elif what == "embedding":
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(259, 32)
    elif what == "pissa":
        config["init_lora_weights"] = "pissa"
    elif what == "replication":
        config["layer_replication"] = [[0, 2], [0, 2]]
    elif what == "other method":
        config["peft_type"] = "IA3"
    elif what == "new option":
        config["use_something_new"] = True
    save_file(tensors, weights)
    options.write_text(json.dumps(config))
    if what == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif what == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "no adapter":
        options.unlink()


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "missing in the file"),
        ("unknown", "lora_C.weight: not wanted"),
        ("shape", "2×2 in the file, 8×32 for this base"),
        ("embedding", "embed_tokens.weight: not wanted"),
        ("pissa", "changed the weights of its base"),
        ("replication", "layer_replication"),
        ("other method", "holds a IA3 adapter"),
        ("new option", "use_something_new"),
        ("pickle", "is a pickle"),
        ("damaged", "cannot be read"),
        ("no adapter", "no adapter_config.json"),
    ],
)
def test_a_spoilt_file_is_refused_and_the_base_stays(what: str, message: str, tmp_path: Path) -> None:
    adapter, ctx = LoraAdapter(), context(tmp_path)
    model = adapter.adapter_apply(base(), "default", LoraConfig(), ctx)
    adapter.adapter_save(model, "default", LoraConfig(), tmp_path / "a", False)
    _spoil(tmp_path / "a", what)
    target = base()
    with pytest.raises(ArtifactError) as caught:
        adapter.adapter_load(target, "default", tmp_path / "a", True, ctx)
    assert message in str(caught.value) and caught.value.fix
    assert list(target.state_dict()) == list(base().state_dict())
    assert torch.equal(logits(target), logits(base()))
