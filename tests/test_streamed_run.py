"""A base that stays in its files trains what a loaded one trains, to the bit."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from hyperion import FinetuneConfig, Trainer
from hyperion.acceleration import layerwise as layerwise_module
from hyperion.acceleration import streaming
from hyperion.acceleration.layerwise import layerwise
from hyperion.data import DatasetProcessor
from hyperion.engine.fit import Speed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="weights are not streamed on Windows")
ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(12)]


def test_a_streamed_run_learns_the_same(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each weight of the base is let go of once when it is loaded, and again whenever it was trained with."""
    let_go: Counter[int] = Counter()
    release = streaming.release

    def counted(mapped: Tensor) -> None:
        let_go[mapped.data_ptr()] += 1
        release(mapped)

    monkeypatch.setattr(streaming, "release", counted)
    train, _ = DatasetProcessor(dataset=ROWS).prepare()
    for streams in (False, True):
        config = FinetuneConfig(
            base_model=str(tiny_model),
            dtype="float32",
            adapter={"type": "lora", "r": 2},
            training={
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 2e-2,
                "use_cpu": True,
                "logging_steps": 1,
                "eval_steps": 2,
                "eval_samples": 0,
                "stream_weights": streams,
            },
        )
        assert not let_go, "a loaded base has nothing to let go of"
        Trainer(config).train(train, train.select(range(4)), output_dir=tmp_path / str(streams))
    with safe_open(tiny_model / "model.safetensors", framework="pt") as stored:
        assert len(let_go) == len(list(stored.keys()))
    assert min(let_go.values()) > 3
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        loaded, streamed = ((tmp_path / str(streams) / name).read_bytes() for streams in (False, True))
        assert loaded == streamed, name


def test_a_run_whose_weights_come_to_the_device_learns_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, however small. Evaluated, and with the best checkpoint loaded at the end. The device is a CPU here,
    where a copy of a weight is a copy too."""
    train, evaluation = DatasetProcessor(dataset=ROWS, validation_split=4).prepare()
    monkeypatch.setattr(layerwise_module, "_LEAST", 0)
    for way in ("loaded", "streamed"):
        if way == "streamed":
            monkeypatch.setattr(Speed, "streaming", lambda self, model, device: layerwise(model, device))
        config = FinetuneConfig(
            base_model=str(tiny_model),
            dtype="float32",
            adapter={"type": "lora", "r": 2, "init_lora_weights": "pissa"},
            training={
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.3,
                "lr_scheduler": "constant",
                "use_cpu": True,
                "logging_steps": 1,
                "save_steps": 2,
                "eval_steps": 2,
                "eval_samples": 1,
                "load_best_model_at_end": True,
                "recompute_layers": 1,
                "offload_activations": "disk",
            },
        )
        trained = Trainer(config).train(train, evaluation, output_dir=tmp_path / way)
        assert trained.metrics["eval_loss"] < json.loads(last_line(tmp_path / way / "metrics.jsonl"))["eval_loss"]
    for name in ("metrics.jsonl", "samples.jsonl", "adapter_model.safetensors"):
        loaded, streamed = ((tmp_path / way / name).read_bytes() for way in ("loaded", "streamed"))
        assert loaded == streamed, name


def last_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[-1]
