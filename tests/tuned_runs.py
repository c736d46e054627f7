"""Small runs for the tests of merging: a base whose answers are no coin tosses, and an adapter that has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperion_core.testing.tiny import save_tiny_base

from hyperion import Artifact, FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor

ROWS = [{"prompt": f"<ask> {n} plus {n}?", "completion": f" <tell> {n + n}"} for n in range(24)]
LORA = {"type": "lora", "r": 4, "target_modules": "all-linear"}
RTN = {"method": "rtn", "bits": 4, "group_size": 16}


def base_model(folder: Path, **overrides: Any) -> Path:
    """With weights ten times those of a fresh model, so that it prefers some tokens to others."""
    return save_tiny_base(folder, **{"initializer_range": 0.2, **overrides})


def tuned_run(folder: Path, base: Path, *, seed: int = 0, **changes: Any) -> Artifact:
    """Trained for some steps, and finished: adapter, plan and tokenizer are in `folder`."""
    config = FinetuneConfig(
        **{
            "base_model": str(base),
            "dtype": "float32",
            "adapter": LORA,
            "training": {
                "max_steps": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": 2e-2,
                "use_cpu": True,
                "eval_samples": 0,
                "seed": seed,
            },
            **changes,
        }
    )
    train, _ = DatasetProcessor(dataset=ROWS).prepare()
    return Trainer(config).train(train, output_dir=folder)
