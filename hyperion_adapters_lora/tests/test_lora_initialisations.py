"""Initialisations that start from weights, activations or gradients, on a base that stays as it is; and LoRA+."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan, Workload
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing.adapters import context
from hyperion_core.testing.tiny import tiny_llama
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hyperion_adapters_lora import LoraAdapter, LoraConfig

IDS = torch.randint(0, 200, (3, 10), generator=torch.Generator().manual_seed(1))
PATTERNS = {"rank_pattern": {"q_proj": 2, "model.embed_tokens": 5}, "alpha_pattern": {r"layers\.0\..*v_proj": 32}}
FORMS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "target_modules": "all-linear"},
    "pissa, approximate": {"init_lora_weights": "pissa_niter_16", "r": 4, "lora_alpha": 5},
    "olora, rslora, patterns": {
        "init_lora_weights": "olora",
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "embed_tokens"],
        **PATTERNS,
    },
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["norm"]},
    "lora_ga": {"init_lora_weights": "lora_ga", "r": 4, "target_modules": "all-linear", "init_rows": 2},
    "eva": {"init_lora_weights": "eva", **PATTERNS},
}


def base(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    return tiny_llama(attention_bias=True, **overrides).to(dtype)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def attached(adapter: LoraAdapter, config: LoraConfig, folder: Path, model: Any, name: str = "default") -> Any:
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}]
    ctx = context(folder)
    adapter.adapter_prepare(config, model, iter(batches), ctx)
    return adapter.adapter_apply(model, name, config, ctx)


def optimizer_of(adapter: LoraAdapter, model: Any, config: LoraConfig, rate: float = 1e-2) -> torch.optim.Adam:
    groups = adapter.adapter_param_groups(model, "default", config)
    return torch.optim.Adam([{"params": [p for _, p in g.parameters], "lr": rate * g.lr_ratio} for g in groups])


def train(model: Any, optimizer: torch.optim.Adam, steps: int = 3) -> None:
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same_bits(one: Any, other: Any) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize(
    "form, dtype",
    [
        *((form, torch.float32) for form in FORMS),
        *((form, torch.bfloat16) for form in FORMS if "dora" not in form),  # which rounds otherwise than such a base
    ],
    ids=str,
)
def test_it_starts_as_the_base_and_leaves_it_so(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter, config = LoraAdapter(), LoraConfig(**FORMS[form])
    model = attached(adapter, config, tmp_path, base(dtype))
    assert torch.equal(logits(model), logits(base(dtype)))
    (group,) = adapter.adapter_param_groups(model, "default", config)
    cost = adapter.adapter_estimate(config, live_model_facts(base()), Workload(1, 8))
    assert cost.memory["adapter"] == 4 * sum(p.numel() for _, p in group.parameters)
    assert {p.dtype for _, p in group.parameters} == {torch.float32}
    train(model, optimizer_of(adapter, model, config))
    assert not torch.equal(logits(model), logits(base(dtype)))
    assert same_bits(adapter.adapter_unload(model, "default"), base(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_a_plain_lora(form: str, tmp_path: Path) -> None:
    adapter, config = LoraAdapter(), LoraConfig(**FORMS[form])
    model = attached(adapter, config, tmp_path, base())
    train(model, optimizer_of(adapter, model, config))
    tuned = logits(model)
    for for_resume in (False, True):
        folder = tmp_path / str(for_resume)
        adapter.adapter_save(model, "default", config, folder, for_resume)
        assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
        plain = peft.PeftModel.from_pretrained(base(), folder)
        torch.testing.assert_close(logits(plain), tuned, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(plain.merge_and_unload()), tuned, rtol=1e-5, atol=1e-5)
    cost = adapter.adapter_estimate(config, live_model_facts(base()), Workload(1, 8))
    size = sum(t.nbytes for t in load_file(tmp_path / "False" / "adapter_model.safetensors").values())
    assert size == cost.disk

    again = adapter.adapter_load(base(), "other", tmp_path / "False", True, context(tmp_path))
    torch.testing.assert_close(logits(again), tuned, rtol=1e-5, atol=1e-5)
    adapter.adapter_save(again, "other", config, tmp_path / "on", True)  # trained on, it is a plain LoRA
    further = adapter.adapter_load(base(), "other", tmp_path / "on", True, context(tmp_path))
    for model in (again, further):
        assert not any("parametrizations" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("form", [form for form in FORMS if "dora" not in form])
def test_merged_equals_unmerged(form: str, tmp_path: Path) -> None:
    adapter, config = LoraAdapter(), LoraConfig(**FORMS[form])
    model = attached(adapter, config, tmp_path, base())
    train(model, optimizer_of(adapter, model, config))
    merged = base()
    for name in adapter.adapter_targets(config, live_model_facts(base())):
        module = merged.get_submodule(name)
        module.weight.data, _ = adapter.adapter_merge_weight(model, "default", name, module.weight.data, None)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_goes_on_to_the_bit(form: str, tmp_path: Path) -> None:
    adapter, config, ctx = LoraAdapter(), LoraConfig(**FORMS[form]), context(tmp_path)
    model = attached(adapter, config, tmp_path, base())
    optimizer = optimizer_of(adapter, model, config)
    train(model, optimizer)
    adapter.adapter_save(model, "default", config, tmp_path / "at 3", True)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer)

    resumed = LoraAdapter().adapter_load(base(), "default", tmp_path / "at 3", True, ctx)
    names = [name for name, parameter in resumed.named_parameters() if parameter.requires_grad]
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    second = optimizer_of(adapter, resumed, config)
    second.load_state_dict(state)
    train(resumed, second)
    assert same_bits(resumed, model)
    for number, each in enumerate((model, resumed)):
        adapter.adapter_save(each, "default", config, tmp_path / str(number), False)
    assert len({(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in (0, 1)}) == 1

    used = adapter.adapter_load(base(), "default", tmp_path / "at 3", False, ctx)
    assert not any(parameter.requires_grad for parameter in used.parameters())


def test_several_act_with_their_strengths_and_one_leaves_without_a_trace(tmp_path: Path) -> None:
    adapter, ctx = LoraAdapter(), context(tmp_path)
    config = LoraConfig(init_lora_weights="pissa", r=4, target_modules=["lm_head"])
    model = attached(adapter, config, tmp_path, base())
    train(model, optimizer_of(adapter, model, config))
    plain, alone = logits(base()), logits(model)
    model = adapter.adapter_apply(model, "second", LoraConfig(**{**config.given(), "r": 6}), ctx)
    assert torch.equal(logits(model), plain)  # its start is that of the base, not of the first one
    adapter.adapter_activate(model, {"default": 0.5})
    torch.testing.assert_close(logits(model) - plain, 0.5 * (alone - plain), rtol=1e-4, atol=1e-5)
    adapter.adapter_activate(model, {"default": 1.0, "second": -1.0})
    torch.testing.assert_close(logits(model), alone, rtol=1e-5, atol=1e-5)
    model = adapter.adapter_unload(model, "second")
    adapter.adapter_activate(model, {"default": 1.0})
    assert torch.equal(logits(model), alone)


def test_what_is_learnt_survives_bfloat16(tmp_path: Path) -> None:
    """Steps far below the digits of a start in half precision: a difference of two rounded products would lose them."""
    adapter, config = LoraAdapter(), LoraConfig(init_lora_weights="pissa", r=4, target_modules=["q_proj"])
    model = attached(adapter, config, tmp_path, base())
    train(model, optimizer_of(adapter, model, config, rate=1e-6))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.get_delta_weight("default").detach()
    up, down = layer.lora_B["default"].weight.bfloat16(), layer.lora_A["default"].weight.bfloat16()
    rounded = layer.scaling["default"] * up.float() @ down.float()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_on_a_four_bit_base(form: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("hyperion_quant_bnb")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base(**sizes).save_pretrained(tmp_path / "base")

    def quantized() -> Any:
        quantizer, options, bits, ctx = bnb.BnbQuantizer(), bnb.BnbConfig(bits=4), BitPlan(4, 0), context(tmp_path)
        kwargs = quantizer.quantizer_load_kwargs(tmp_path / "base", options, bits, ctx)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **kwargs)
        return quantizer.quantizer_after_load(model, options, bits)

    adapter, config = LoraAdapter(), LoraConfig(**FORMS[form])
    model = attached(adapter, config, tmp_path, quantized())
    assert torch.equal(logits(model), logits(quantized())) and not torch.equal(logits(model), logits(base(**sizes)))
    train(model, optimizer_of(adapter, model, config))
    tuned = logits(model)
    assert not torch.equal(tuned, logits(quantized()))
    adapter.adapter_save(model, "default", config, tmp_path / "a", False)
    plain = peft.PeftModel.from_pretrained(quantized(), tmp_path / "a")
    torch.testing.assert_close(logits(plain), tuned, rtol=1e-5, atol=1e-5)
    assert same_bits(adapter.adapter_unload(model, "default"), quantized())


def test_the_offset_is_of_the_layers_own_weight_and_scaling(tmp_path: Path) -> None:
    adapter, config = LoraAdapter(), LoraConfig(init_lora_weights="pissa", r=3, lora_alpha=7, use_rslora=True)
    model = attached(adapter, config, tmp_path, base())
    layer: Any = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    parts = [held["default"].parametrizations.weight for held in (layer.lora_B, layer.lora_A)]
    product = 7 / math.sqrt(3) * parts[0][0].start @ parts[1][0].start
    left, values, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
    torch.testing.assert_close(product, left[:, :3] @ torch.diag(values[:3]) @ right[:3], rtol=1e-4, atol=1e-5)
    assert torch.equal(parts[0].original, parts[0][0].start) and not parts[0][0].start.requires_grad


def test_data_must_have_been_looked_at(tmp_path: Path) -> None:
    adapter, config, ctx = LoraAdapter(), LoraConfig(init_lora_weights="eva"), context(tmp_path)
    model = base()
    with pytest.raises(CompatibilityError, match="without data"):
        adapter.adapter_apply(model, "default", config, ctx)
    nothing = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.full_like(IDS, -100)}
    with pytest.raises(CompatibilityError, match="cannot be initialised from this data"):
        adapter.adapter_prepare(config, model, iter([nothing]), ctx)
    assert same_bits(model, base())


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_module_that_no_row_reaches_starts_as_plain_lora(
    init: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = base()
    model.model.layers[0].unused = nn.Linear(32, 16)
    adapter, config = LoraAdapter(), LoraConfig(init_lora_weights=init, r=4, target_modules=["q_proj", "unused"])
    model = attached(adapter, config, tmp_path, model)
    assert "start as plain LoRA (1)" in caplog.text and "layers.0.unused" in caplog.text
    layer: Any = model.get_submodule("base_model.model.model.layers.0.unused")
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert not up.any() and down[:4].any() and not down[4:].any()
    assert torch.equal(logits(model), logits(base()))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"init_lora_weights": "pissa", "r": 20, "target_modules": ["k_proj", "q_proj"]}, "20 directions"),
        ({"init_lora_weights": "lora_ga", "r": 9, "target_modules": ["k_proj", "q_proj"]}, "18 directions"),
    ],
)
def test_a_rank_that_no_decomposition_has_is_refused_while_planning(options: dict[str, Any], words: str) -> None:
    (problem,) = LoraAdapter().adapter_check(LoraConfig(**options), live_model_facts(base()), None)
    assert problem.path == "r" and words in problem.why and "k_proj" in problem.what
    enough = LoraConfig(**{**options, "rank_pattern": {"k_proj": 8}})
    assert LoraAdapter().adapter_check(enough, live_model_facts(base()), None) == []


def test_loraplus_trains_b_at_its_ratio(tmp_path: Path) -> None:
    adapter = LoraAdapter()
    options: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "bias": "lora_only"}
    moved = {}
    for ratio in (None, 16.0):
        config = LoraConfig(loraplus_lr_ratio=ratio, init_lora_weights=False, **options)
        model = attached(adapter, config, tmp_path, base())
        groups = adapter.adapter_param_groups(model, "default", config)
        names = [name for group in groups for name, _ in group.parameters]
        assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
        before = {name: p.detach().clone() for group in groups for name, p in group.parameters}
        train(model, optimizer_of(adapter, model, config, rate=1e-3), steps=1)
        moved[ratio] = {n: (p.detach() - before[n]).abs().max() for group in groups for n, p in group.parameters}
    for name, distance in moved[None].items():
        fast = ".lora_B." in name or "magnitude" in name or name.endswith(".bias")
        torch.testing.assert_close(moved[16.0][name], distance * (16 if fast else 1), rtol=1e-2, atol=1e-7)
    assert any(".lora_embedding_B" in name for name in names)
