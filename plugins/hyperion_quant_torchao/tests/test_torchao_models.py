"""Whole models: bits by module, what is refused, saving, and LoRA on top from the config to the reloaded artifact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import ArtifactError, CompatibilityError, ConfigError, ModelError
from hyperion_core.facts import BitPlan
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing.tiny import save_tiny_base, tiny_llama
from transformers import AutoModelForCausalLM

from hyperion_quant_torchao import TorchaoConfig, TorchaoQuantizer
from hyperion_quant_torchao.packed_linear import PackedLinear

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]
MIXED = BitPlan(3, 16, {"model.layers.1.*": (16, 0), "*.q_proj": (7, 8), "*.down_proj": (2, 0)})
IDS = torch.arange(20)[None]


def quantized(model: Any, bits: BitPlan = MIXED, **options: Any) -> Any:
    return TorchaoQuantizer().quantizer_after_load(model, TorchaoConfig(**options), bits, training=True)


def reloaded(folder: Path, bits: BitPlan = MIXED, **options: Any) -> Any:
    kwargs = TorchaoQuantizer().quantizer_load_kwargs()
    return quantized(AutoModelForCausalLM.from_pretrained(folder, **kwargs), bits, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("sym", [True, False])
def test_bits_by_module_are_in_force_and_come_back(sym: bool, tmp_path: Path) -> None:
    model, quantizer, config = quantized(tiny_llama(), sym=sym), TorchaoQuantizer(), TorchaoConfig(sym=sym)
    found = {name: (info.bits, info.group_size) for name, info in quantizer.quantizer_modules(model).items()}
    assert found == {
        f"model.layers.0.{name}": pair
        for name, pair in {
            "self_attn.q_proj": (7, 8),
            **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (3, 16)),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (3, 16)),
            "mlp.down_proj": (2, 16),  # 48 wide: of the method's own sizes 16 is the largest that fits
        }.items()
    }
    (tmp_path / "saved").mkdir()
    quantizer.quantizer_save(model, config, tmp_path / "saved")
    again = reloaded(tmp_path / "saved", sym=sym)
    assert torch.equal(logits(again), logits(model))
    assert quantizer.quantizer_modules(again) == quantizer.quantizer_modules(model)
    saved = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    options, bits = quantizer.quantizer_recognize(saved)
    assert options == {"sym": sym, "intx_choose_qparams_algorithm": "hqq_scale_only" if sym else "affine"}
    assert {name: bits.of(name) for name in found} == found and bits.of("model.layers.1.mlp.up_proj")[0] == 16
    with pytest.raises(CompatibilityError, match=f"sym: {str(sym).lower()}, and the plan says .* sym"):
        reloaded(tmp_path / "saved", sym=not sym)


def test_full_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one module is quantized, those before it have let their full weight go."""
    model = tiny_llama()
    alive = [weakref.ref(module.weight) for name, module in model.named_modules() if name.endswith("_proj")]
    counts, hold = [], PackedLinear.hold

    def counted(self: PackedLinear, *args: Any) -> None:
        counts.append(sum(ref() is not None for ref in alive))
        hold(self, *args)

    monkeypatch.setattr(PackedLinear, "hold", counted)
    quantized(model, BitPlan(4, 0))
    assert counts == list(range(len(alive), 0, -1))
    assert not any(ref() is not None for ref in alive)


def test_a_group_size_that_does_not_divide_names_the_layers_and_the_way_out() -> None:
    facts = live_model_facts(tiny_llama())
    (problem,) = TorchaoQuantizer().quantizer_check(TorchaoConfig(), facts, BitPlan(4, 32), "cpu")
    assert problem.path == "group_size" and "2 layers" in problem.what
    assert "model.layers.0.mlp.down_proj has 48 inputs" in problem.why
    assert "take 16 or 8, which divide them all" in problem.fix and "leave group_size out" in problem.fix
    facts = live_model_facts(tiny_llama(intermediate_size=44))
    problems = TorchaoQuantizer().quantizer_check(TorchaoConfig(), facts, BitPlan(4, 4), "cpu")
    assert ["no multiple of 8" in problem.what for problem in problems] == [True]
    assert "model.layers.1.mlp.down_proj has 44 inputs" in problems[0].why
    leave = BitPlan(4, 0, {"*.down_proj": (16, 0)})
    assert not TorchaoQuantizer().quantizer_check(TorchaoConfig(), facts, leave, "cpu")


def test_options_that_do_not_go_together_are_explained() -> None:
    with pytest.raises(ConfigError) as caught:
        TorchaoConfig(double_quant=True, sym=False, intx_choose_qparams_algorithm="hqq_scale_only")
    message = str(caught.value)
    assert "torchao does not quantize the scales a second time" in message and "leave double_quant out" in message
    assert "hqq_scale_only knows no zero points" in message


def test_what_another_method_has_quantized_is_refused() -> None:
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CompatibilityError, match='quantized already, by "gptq"'):
        quantized(model)


def test_a_damaged_checkpoint_is_named_as_such(tmp_path: Path) -> None:
    TorchaoQuantizer().quantizer_save(quantized(tiny_llama()), TorchaoConfig(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("modules", None), ("modules", {"a": [4]}), ("sym", "yes")):
        damaged = {**config["quantization_config"], key: value}
        with pytest.raises(ModelError, match="does not say how"):
            TorchaoQuantizer().quantizer_recognize(damaged)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written to") as caught:
        TorchaoQuantizer().quantizer_save(quantized(tiny_llama()), TorchaoConfig(), tmp_path)
    assert caught.value.fix and caught.value.why


def test_rounding_prints_nothing() -> None:
    """In a process of its own: what torchao tells of itself comes when it is first imported."""
    code = (
        "import torch; from hyperion_quant_torchao import TorchaoConfig, TorchaoQuantizer\n"
        "TorchaoQuantizer().quantizer_fake_quantize(torch.ones(8, 8), TorchaoConfig(), 2, 8)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lora_on_top_trains_resumes_and_comes_back(tmp_path: Path) -> None:
    from hyperion import FinetuneConfig, Trainer
    from hyperion.data import DatasetProcessor
    from hyperion.models import load_tuned

    train, evaluation = DatasetProcessor(dataset=ROWS, validation_split=8).prepare()
    config = {
        "base_model": str(save_tiny_base(tmp_path / "base")),
        "dtype": "float32",
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "quantization": {"method": "torchao", "bits": 3, "group_size": 16},
        "training": {
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
            "max_steps": 4, "save_steps": 2, "eval_steps": 4,
        },
    }  # fmt: skip
    trainer, out = Trainer(FinetuneConfig(**config)), tmp_path / "out"
    first = trainer.train(train, evaluation, output_dir=out)
    whole = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-4")
    (out / "hyperion.json").unlink()
    again = trainer.train(train, evaluation, output_dir=out, resume=True)
    assert (out / "adapter_model.safetensors").read_bytes() == whole
    assert again.metrics["eval_loss"] == first.metrics["eval_loss"]

    tuned = load_tuned(out, dtype="float32")
    held = TorchaoQuantizer().quantizer_modules(tuned.model)
    assert len(held) == 14 and {(info.bits, info.group_size) for info in held.values()} == {(3, 16)}
    with_adapter = logits(tuned.model)
    tuned.use_adapter(False)
    base = quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), BitPlan(3, 16))
    assert torch.equal(logits(tuned.model), logits(base)) and not torch.equal(with_adapter, logits(base))
