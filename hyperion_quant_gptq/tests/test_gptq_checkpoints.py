"""Checkpoints: read by others, read from others, refused where they are not what was planned."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import CompatibilityError, ConfigError, HyperionError, ModelError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing.tiny import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hyperion_quant_gptq import GptqConfig, GptqQuantizer
from hyperion_quant_gptq.packed_linear import PackedLinear
from hyperion_quant_gptq.saved_format import written

_spec = importlib.util.spec_from_file_location("gptq_numbers", Path(__file__).with_name("test_gptq_numbers.py"))
assert _spec and _spec.loader
numbers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(numbers)

OLD = Path(__file__).parent / "data/autogptq"
MIXED = BitPlan(3, 0, {"*.down_proj": (8, 32), "*.k_proj": (16, 0)})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


@pytest.mark.parametrize(
    ("plan", "options"),
    [(BitPlan(4, 32), {"sym": False}), (BitPlan(3, 0), {"desc_act": True}), (BitPlan(4, 0, {"*.k_proj": (16, 0)}), {})],
    ids=["zero points", "order", "left out"],
)
def test_plain_transformers_gives_equal_logits(plan: BitPlan, options: dict[str, Any], tmp_path: Path) -> None:
    """With gptqmodel's own modules; and so it does once the loaded model was saved again."""
    from transformers import GPTQConfig

    folder = numbers.quantized(numbers.save_base(tmp_path / "base"), tmp_path / "made", plan, **options)
    ours = numbers.loaded(folder, plan, **options)
    (tmp_path / "again").mkdir()
    config = GptqConfig(bits=plan.bits, **options)
    GptqQuantizer().quantizer_save(ours, config, tmp_path / "again")
    for each in (folder, tmp_path / "again"):
        plain = AutoModelForCausalLM.from_pretrained(
            each, dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")
        )
        assert type(plain.model.layers[0].mlp.up_proj).__module__.startswith("gptqmodel.")
        torch.testing.assert_close(logits(plain), logits(ours), rtol=0, atol=2e-6)


ROWS = BitPlan(4, 64, {"*.down_proj": (4, 128)})


@pytest.mark.parametrize(
    ("widths", "plan"), [((96, 96), BitPlan(4, 96)), ((64, 128), ROWS)], ids=["of an odd width", "of two widths"]
)
def test_groups_that_are_whole_rows_load_in_plain_transformers(
    widths: tuple[int, int], plan: BitPlan, tmp_path: Path
) -> None:
    """And still do when the loaded model was saved again: they are -1 in the file, and stay so."""
    from transformers import GPTQConfig

    base = numbers.save_base(tmp_path / "base", hidden_size=widths[0], intermediate_size=widths[1])
    folder = numbers.quantized(base, tmp_path / "made", plan)
    ours = numbers.loaded(folder, plan)
    (tmp_path / "again").mkdir()
    GptqQuantizer().quantizer_save(ours, GptqConfig(bits=4), tmp_path / "again")
    facts = live_model_facts(AutoModelForCausalLM.from_pretrained(base))
    for each in (folder, tmp_path / "again"):
        saved = json.loads((each / "config.json").read_text())["quantization_config"]
        assert saved["group_size"] == -1 and "dynamic" not in saved
        _, read = GptqQuantizer().quantizer_recognize(saved, facts)
        assert {read.of(module.name) for module in facts.linear()} == {(4, width) for width in widths}
        plain = AutoModelForCausalLM.from_pretrained(
            each, dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")
        )
        assert type(plain.model.layers[0].mlp.up_proj).__module__.startswith("gptqmodel.")
        torch.testing.assert_close(logits(plain), logits(ours), rtol=0, atol=2e-6)


def test_only_groups_whose_number_is_not_read_are_written_otherwise() -> None:
    packed = {
        name: PackedLinear((32, width), None, 4, group_size, sym=True, version=1)
        for name, width, group_size in [("a", 192, 64), ("b", 192, 64), ("c", 96, 96), ("d", 128, 128)]
    }
    saved = written(GptqConfig(), packed, [], 1)
    assert saved["group_size"] == 64
    assert saved["dynamic"] == {"+:^c$": {"bits": 4, "group_size": -1}, "+:^d$": {"bits": 4, "group_size": 128}}
    assert written(GptqConfig(), {"d": packed["d"]}, [], 1)["group_size"] == 128


@pytest.mark.slow
def test_bits_by_module_are_in_force_here_and_in_gptqmodel(tmp_path: Path) -> None:
    folder = numbers.quantized(numbers.save_base(tmp_path / "base"), tmp_path / "made", MIXED, sym=False)
    ours = numbers.loaded(folder, MIXED, sym=False)
    held = {name: (info.bits, info.group_size) for name, info in GptqQuantizer().quantizer_modules(ours).items()}
    layer = "model.layers.0."
    wanted = dict.fromkeys([f"{layer}self_attn.{name}_proj" for name in "qvo"], (3, 64))  # 128 divides not all
    wanted |= dict.fromkeys([f"{layer}mlp.{name}_proj" for name in ("gate", "up")], (3, 64))
    assert held == {**wanted, f"{layer}mlp.down_proj": (8, 32)}
    from gptqmodel import BACKEND, GPTQModel

    numbers.tiny_tokenizer().save_pretrained(folder)
    theirs = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    for name, (bits, group_size) in held.items():
        module = theirs.get_submodule(name)
        assert (module.bits, module.group_size) == (bits, group_size)
        found = module.dequantize_weight().T.float()
        assert torch.equal(found, ours.get_submodule(name).weight), name
    assert isinstance(theirs.get_submodule(f"{layer}self_attn.k_proj"), torch.nn.Linear)


@pytest.mark.parametrize(("name", "bits", "desc_act"), [("4bit-desc_act", 4, True), ("3bit", 3, False)])
def test_what_auto_gptq_wrote_is_read_as_it_meant_it(name: str, bits: int, desc_act: bool) -> None:
    saved = json.loads((OLD / name / "config.json").read_text())["quantization_config"]
    facts = live_model_facts(AutoModelForCausalLM.from_pretrained(OLD / name, **kwargs(OLD / name)))
    options, plan = GptqQuantizer().quantizer_recognize(saved, facts)
    assert options == {"bits": bits, "group_size": 32, "sym": True, "desc_act": desc_act, "damp_percent": 0.01,
                       "mse": 0.0, "distill_steps": 0}  # fmt: skip
    model = numbers.loaded(OLD / name, plan, desc_act=desc_act)
    expected = load_file(OLD / f"{name}.weights.safetensors")
    assert len(expected) == 2
    for module, weight in expected.items():
        found = GptqQuantizer().quantizer_dequantize(model.get_submodule(module))
        assert torch.equal(found, weight.half().float()), module


def kwargs(folder: Path) -> dict[str, Any]:
    return GptqQuantizer().quantizer_load_kwargs(folder)


def test_padding_and_overlong_rows_change_nothing(tmp_path: Path) -> None:
    """Rows of other lengths in one batch, filled up with tokens that the mask hides; and one beyond the context."""
    base = numbers.save_base(tmp_path / "base", max_position_embeddings=40)
    plain = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in (torch.arange(30)[None], torch.arange(100, 140)[None], torch.arange(140, 160)[None])
    ]
    batch, mask = torch.full((2, 60), 7), torch.zeros(2, 60, dtype=torch.int64)
    batch[0, 30:], mask[0, 30:] = torch.arange(30), 1
    batch[1], mask[1] = torch.arange(100, 160), 1
    padded = [{"input_ids": batch, "attention_mask": mask}]
    made = [
        numbers.quantized(base, tmp_path / name, BitPlan(4, 32), data) / "model.safetensors"
        for name, data in (("plain", plain), ("padded", padded))
    ]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_what_is_not_quantized_keeps_its_type(tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    numbers.tiny_tokenizer().save_pretrained(tmp_path / "half")
    folder = numbers.quantized(tmp_path / "half", tmp_path / "made", BitPlan(4, 0))
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert tensors["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16


def test_gpt2s_layers_are_quantized_too(tmp_path: Path) -> None:
    """Its Conv1D keeps the weight the other way round, and its blocks are called otherwise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=256, n_positions=32)).eval()
    whole.save_pretrained(tmp_path / "base")
    model = numbers.loaded(numbers.quantized(tmp_path / "base", tmp_path / "made", BitPlan(8, 0)), BitPlan(8, 0))
    assert len(GptqQuantizer().quantizer_modules(model)) == 8
    assert (logits(model) - logits(whole)).norm() < 0.05 * logits(whole).norm()


def test_a_damaged_checkpoint_is_named_as_such(tmp_path: Path) -> None:
    folder = numbers.quantized(numbers.save_base(tmp_path / "base"), tmp_path / "made", BitPlan(4, 32))
    tensors, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.g_idx"
    save_file({**tensors, name: tensors[name] + 5}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="q_proj is damaged: its inputs belong to groups that do not exist"):
        numbers.loaded(folder, BitPlan(4, 32))
    facts, saved = live_model_facts(tiny_llama()), json.loads((folder / "config.json").read_text())
    for change in ({"bits": None}, {"sym": "yes"}, {"dynamic": {"+:(": {}}}):
        with pytest.raises(ModelError, match="does not say how"):
            GptqQuantizer().quantizer_recognize({**saved["quantization_config"], **change}, facts)
    for change in ({"checkpoint_format": "marlin"}, {"lm_head": True}, {"bits": 5}):
        with pytest.raises(ModelError, match="which is not read"):
            GptqQuantizer().quantizer_recognize({**saved["quantization_config"], **change}, facts)


def test_another_checkpoint_than_planned_is_refused(tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base")
    folder = numbers.quantized(base, tmp_path / "made", BitPlan(4, 32))
    with pytest.raises(CompatibilityError, match="4 bits in groups of 32, and the plan says 3 bits"):
        numbers.loaded(folder, BitPlan(3, 32))
    with pytest.raises(CompatibilityError, match="sym: true, and the plan says sym: false"):
        numbers.loaded(folder, BitPlan(4, 32), sym=False)
    prepare = GptqQuantizer().quantizer_prepare
    assert prepare(folder, GptqConfig(), BitPlan(4, 32), numbers.rows(), tmp_path, numbers.context(tmp_path)) is None
    with pytest.raises(CompatibilityError, match="no checkpoint of GPTQ"):
        kwargs(base)


def test_a_group_size_that_does_not_fit_names_the_layers_and_the_way_out() -> None:
    facts = live_model_facts(tiny_llama(hidden_size=64, intermediate_size=96))
    check = GptqQuantizer().quantizer_check
    (problem,) = check(GptqConfig(), facts, BitPlan(4, 64), "cpu")
    assert problem.path == "group_size" and "2 layers" in problem.what
    assert "model.layers.0.mlp.down_proj has 96 inputs" in problem.why and "take 32 or 16" in problem.fix
    (problem,) = check(GptqConfig(), facts, BitPlan(4, 8), "cpu")
    assert "no groups of 8" in problem.what
    odd = live_model_facts(tiny_llama(hidden_size=64, intermediate_size=80))
    (problem,) = check(GptqConfig(), odd, BitPlan(3, 16), "cpu")
    assert "cannot be packed in 3 bits" in problem.what and "multiples of 32" in problem.why
    assert not check(GptqConfig(), odd, BitPlan(4, 16), "cpu")


def test_16_bits_for_all_are_refused_and_for_some_are_not() -> None:
    facts, unknown = live_model_facts(tiny_llama()), ModelFacts("somewhere")
    check = GptqQuantizer().quantizer_check
    for model, plan in ((facts, BitPlan(16, 0)), (unknown, BitPlan(16, 0)), (facts, BitPlan(4, 0, {"*": (16, 0)}))):
        (problem,) = check(GptqConfig(), model, plan, "cpu")
        assert problem.path == "bits" and problem.what == "16 bits quantize nothing" and "2, 3, 4, 8" in problem.fix
    assert not check(GptqConfig(), facts, BitPlan(16, 0, {"*.down_proj": (4, 0)}), "cpu")
    assert not check(GptqConfig(), facts, BitPlan(4, 0, {"*.down_proj": (16, 0)}), "cpu")
    saved = json.loads((OLD / "3bit/config.json").read_text())["quantization_config"]
    _, read = GptqQuantizer().quantizer_recognize(saved, unknown)  # its modules are not known: no 16 bits for all
    assert read == BitPlan(3, 32) and not check(GptqConfig(), unknown, read, "cpu")


def test_double_quant_is_explained() -> None:
    with pytest.raises(ConfigError) as caught:
        GptqConfig(double_quant=True)
    assert "GPTQ does not quantize the scales a second time" in str(caught.value) and "bnb" in str(caught.value)


def test_data_of_padding_alone_and_a_model_that_gives_no_numbers_are_clear_errors(tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base")
    nothing = [{"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4)}]
    with pytest.raises(HyperionError, match="no calibration data"):
        numbers.quantized(base, tmp_path / "a", BitPlan(4, 32), nothing)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match="GPTQ cannot round") as caught:
        numbers.quantized(tmp_path / "nan", tmp_path / "b", BitPlan(4, 32))
    assert caught.value.why and caught.value.fix


@pytest.mark.slow
def test_quantizing_leaves_the_process_as_it_was_and_prints_nothing(tmp_path: Path) -> None:
    """In one of its own: what gptqmodel does to it, it does when it is first imported."""
    base = numbers.save_base(tmp_path / "base")
    code = f"""
import logging, os, random, sys, warnings, torch, safetensors.torch
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("n", {str(Path(__file__).with_name("test_gptq_numbers.py"))!r})
n = importlib.util.module_from_spec(spec); spec.loader.exec_module(n)
def state():
    root = logging.getLogger()
    return (dict(os.environ), root.level, list(root.handlers), torch.get_num_threads(), safetensors.torch.save_file,
            torch.get_rng_state().sum().item(), random.getstate(), torch.is_grad_enabled(), sys.stdout, sys.stderr)
from transformers.utils import logging as bars
bars.disable_progress_bar()
before = state()
n.quantized(Path({str(base)!r}), Path({str(tmp_path / "made")!r}), n.BitPlan(4, 32))
assert "gptqmodel" in sys.modules
assert [a == b for a, b in zip(before, state())] == [True] * 10, [a == b for a, b in zip(before, state())]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
