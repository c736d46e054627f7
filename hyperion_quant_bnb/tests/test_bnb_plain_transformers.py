"""The same weights, logits and gradients as transformers and PEFT get from bitsandbytes; they load what is saved here.

Plain models are compared in training mode (they have no dropout): in evaluation bitsandbytes' CPU code rounds scales
to bfloat16 on some processors, and activations to 8 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan
from hyperion_core.plan import Plan
from hyperion_core.testing.tiny import save_tiny_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hyperion_quant_bnb import BnbConfig, BnbQuantizer

IDS = torch.randint(0, 200, (3, 11), generator=torch.Generator().manual_seed(3))
# Of blocks that divide the rows: others come out wrong from bitsandbytes' own CPU kernel.
FORMS: list[dict[str, Any]] = [
    {},
    {"group_size": 128, "double_quant": True},
    {"group_size": 32, "quant_type": "fp4", "double_quant": False},
    {"skip_modules": ["down_proj", "model.layers.0.self_attn.q_proj"]},
    {"bits": 8, "skip_modules": ["o_proj"]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"), hidden_size=128, intermediate_size=256, attention_bias=True)


def load(source: Path, dtype: str = "float32", **options: Any) -> Any:
    """As a run loads it."""
    config = BnbConfig(**options)
    bits, quantizer = BitPlan(config.bits, config.group_size or 0), BnbQuantizer()  # type: ignore[arg-type]
    plan = Plan(config={}, choices=(), device="cpu", dtype=dtype)
    ctx = RunContext(plan=plan, seed=0, device="cpu", output=source, cache=source)
    kwargs = quantizer.quantizer_load_kwargs(source, config, bits, ctx)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **kwargs)
    return quantizer.quantizer_after_load(model, config, bits)


def plain(source: Path, dtype: str = "float32", **options: Any) -> Any:
    told = {"quantization_config": BitsAndBytesConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **told)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_and_logits_are_those_of_transformers_own_loading(base: Path, bits: int, dtype: str) -> None:
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    theirs = plain(base, dtype, **({"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, **nf4})).train()
    ours = load(base, dtype, bits=bits).train()
    assert torch.equal(logits(ours), logits(theirs))
    said = ours.state_dict()
    assert all(torch.equal(tensor, said[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_evaluation_computes_what_training_computes(base: Path, options: dict[str, Any]) -> None:
    model = load(base, **options)
    trained = logits(model.train())
    for _ in range(2):
        assert torch.equal(logits(model.eval()), trained)
    assert torch.equal(logits(model.train()), trained)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_is_saved_loads_in_plain_transformers(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(base, **options)
    expected = logits(model)
    quantizer = BnbQuantizer()
    quantizer.quantizer_save(model, BnbConfig(**options), tmp_path)
    again = plain(tmp_path)
    assert torch.equal(logits(again.train()), expected)
    found = quantizer.quantizer_modules(model)
    assert {name: (info.bits, info.group_size) for name, info in quantizer.quantizer_modules(again).items()} == {
        name: (info.bits, info.group_size) for name, info in found.items()
    }
    skipped = options.get("skip_modules", [])
    assert not [name for name in found if any(name.endswith(end) for end in skipped)] and len(found) > 5
    assert torch.equal(logits(load(tmp_path, **options)), expected), "and here"


def test_gradients_of_an_adapter_are_those_of_plain_qlora(base: Path) -> None:
    theirs = plain(base, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    found = []
    for model in (load(base), theirs):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in gradients)
        found.append((loss.detach(), gradients))
    (our_loss, ours), (their_loss, others) = found
    assert torch.equal(our_loss, their_loss)
    assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"bits": 8}, "fp4 in blocks of 32"),
        ({"quant_type": "nf4", "group_size": 32, "double_quant": False}, "nf4 in blocks of 32"),
        ({"quant_type": "fp4", "group_size": 64, "double_quant": False}, "in blocks of 64"),
        ({"quant_type": "fp4", "group_size": 32}, "with quantized scales"),
        ({"quant_type": "fp4", "group_size": 32, "double_quant": False, "skip_modules": ["k_proj"]}, "not quantized"),
    ],
)
def test_a_base_that_is_quantized_otherwise_is_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    saved = BnbConfig(quant_type="fp4", group_size=32, double_quant=False)
    BnbQuantizer().quantizer_save(load(base, **saved.given()), saved, tmp_path)
    with pytest.raises(CompatibilityError, match="quantized otherwise than planned") as caught:
        load(tmp_path, **options)
    assert named in str(caught.value) or "in 8 bits" in str(caught.value)


def test_a_checkpoint_of_plain_transformers_is_recognized(base: Path, tmp_path: Path) -> None:
    """It does not say its block size: the files do. Its compute type is kept, unless the config has another."""
    plain(
        base, load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=["k_proj", "lm_head"]
    ).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    from hyperion_core.live_facts import live_model_facts

    facts = live_model_facts(AutoModelForCausalLM.from_pretrained(base))
    options, bits = BnbQuantizer().quantizer_recognize(saved, facts)
    assert options == {"bits": 4, "quant_type": "fp4", "double_quant": False}
    assert bits.of("model.layers.0.self_attn.k_proj")[0] == 16 and bits.of("model.layers.1.mlp.up_proj") == (4, 0)
    for asked, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = load(tmp_path, **options, skip_modules=["k_proj"], compute_dtype=asked)
        assert model.get_submodule("model.layers.1.mlp.up_proj").compute_dtype == expected
        assert logits(model).isfinite().all()


def test_a_quantized_output_head_is_named_as_what_is_in_the_way(base: Path, tmp_path: Path) -> None:
    """No option of ours would help there."""
    plain(base, load_in_8bit=True, llm_int8_skip_modules=["none"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(CompatibilityError, match="the output head of this base, lm_head, is quantized too"):
        load(tmp_path / "saved", bits=8)
