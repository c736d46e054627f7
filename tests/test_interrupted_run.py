"""A run that is killed and resumed ends in the same bytes as one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperion.monitoring.metrics import MetricsFile


def write_config(folder: Path, base: Path) -> Path:
    rows = [{"prompt": f"{'count ' * (n % 5)}{n} is", "completion": f" {n * n}"} for n in range(44)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "base_model": str(base),
        "dtype": "float32",
        "adapter": {"type": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "dataset": {"dataset": "rows.jsonl", "validation_split": 4},
        "training": {
            "num_train_epochs": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "use_cpu": True,
            "learning_rate": 5e-3, "eval_steps": 4, "save_steps": 4, "logging_steps": 1, "eval_samples": 1,
            "eval_samples_max_new_tokens": 4, "neftune_noise_alpha": 2.0, "weight_decay": 0.01,
        },
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def kill_once_there_is(checkpoint: Path, command: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not checkpoint.exists():
            assert process.poll() is None, f"the run ended before {checkpoint.name}"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("step", [4, 16], ids=["first epoch", "later epoch"])
def test_killed_and_resumed_is_bit_identical(step: int, cli, tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    whole = cli("train", config, "--output_dir", "whole")
    assert whole.code == 0, whole.stderr

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "hyperion", "train", str(config), "--output_dir", str(out)]
    kill_once_there_is(out / f"checkpoint-{step}", command)
    assert not (out / "hyperion.json").exists()
    resumed = cli("train", config, "--output_dir", out, "--resume")
    assert resumed.code == 0, resumed.stderr

    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert figures(out) == figures(tmp_path / "whole")


def figures(folder: Path) -> list[dict[str, float]]:
    timed = ("second", "runtime")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in timed)}
        for record in MetricsFile(folder / "metrics.jsonl").read()
    ]
