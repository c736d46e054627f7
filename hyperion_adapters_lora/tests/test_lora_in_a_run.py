"""Through the framework: data-driven starts get their data, LoRA+ its learning rates, and a killed run its bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hyperion_core.testing.tiny import save_tiny_base
from transformers import LlamaForCausalLM

from hyperion import FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor
from hyperion.models import load_tuned

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "eva"])
def test_it_resumes_to_the_bit_and_leaves_a_plain_adapter(init: str, tmp_path: Path) -> None:
    base, out = save_tiny_base(tmp_path / "base"), tmp_path / "out"

    def train(**how: Any) -> Any:
        options = {"r": 4, "lora_alpha": 8, "init_lora_weights": init, "loraplus_lr_ratio": 8}
        config = FinetuneConfig(
            base_model=str(base),
            adapter={"type": "lora", **options},
            dtype="float32",
            training={"per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
                      "use_cpu": True, "max_steps": 4, "save_steps": 2, "eval_samples": 0},
        )  # fmt: skip
        rows, _ = DatasetProcessor(dataset=ROWS).prepare()
        return Trainer(config).train(rows, output_dir=out, **how)

    train()
    whole = (out / "adapter_model.safetensors").read_bytes()
    state = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in state["param_groups"]] == [1e-3, 8e-3]
    shutil.rmtree(out / "checkpoint-4")
    (out / "hyperion.json").unlink()
    train(resume=True)
    assert (out / "adapter_model.safetensors").read_bytes() == whole

    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    with torch.no_grad():
        expected = load_tuned(out, dtype="float32").model.eval()(input_ids=ids).logits
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
