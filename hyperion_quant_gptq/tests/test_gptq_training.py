"""LoRA on a base that GPTQ has rounded, from the config to the reloaded artifact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.testing.tiny import save_tiny_base

from hyperion_quant_gptq import GptqQuantizer

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]


def test_it_trains_resumes_and_comes_back_quantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperion import FinetuneConfig, Trainer
    from hyperion.data import DatasetProcessor
    from hyperion.models import load_tuned

    monkeypatch.setenv("HYPERION_CACHE", str(tmp_path / "cache"))
    times: list[Path] = []
    prepare = GptqQuantizer.quantizer_prepare

    def counted(self: Any, source: Any, config: Any, bits: Any, calibration: Any, folder: Any, ctx: Any) -> Any:
        times.append(folder)
        return prepare(self, source, config, bits, calibration, folder, ctx)

    monkeypatch.setattr(GptqQuantizer, "quantizer_prepare", counted)
    train, evaluation = DatasetProcessor(dataset=ROWS, validation_split=8).prepare()
    base = save_tiny_base(tmp_path / "base", hidden_size=64, intermediate_size=96)
    config: dict[str, Any] = {
        "base_model": str(base),
        "dtype": "float32",
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "quantization": {"method": "gptq", "bits": 3, "group_size": 32},
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
    held = GptqQuantizer().quantizer_modules(tuned.model)
    assert len(held) == 14 and {(info.bits, info.group_size) for info in held.values()} == {(3, 32)}
    assert len(times) == 1, "the same base, options and rows: once"
    assert len(list((tmp_path / "cache/quantized").glob("gptq-*"))) == 1

    with torch.no_grad():
        with_adapter = tuned.model(torch.arange(20)[None]).logits
        tuned.use_adapter(False)
        assert not torch.equal(tuned.model(torch.arange(20)[None]).logits, with_adapter)
