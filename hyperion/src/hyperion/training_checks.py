"""What stands against `training:` once model, device and data are known; what the keys alone show is refused before."""

from __future__ import annotations

import sys

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import Problem
from hyperion_core.facts import ModelFacts

from .training_config import TrainingConfig

_NEED_EVALUATION = ("early_stopping_patience", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end")


def evaluation_problems(training: TrainingConfig) -> list[Problem]:
    """Keys that do nothing because there is no evaluation data."""
    dead = [key for key in _NEED_EVALUATION if getattr(training, key, None)]
    if training.eval_strategy not in (None, "no"):
        dead.append("eval_strategy")
    if training.save_strategy == "best":
        dead.append("save_strategy")
    why, fix = "there is no evaluation data", "set dataset.validation_split, or leave it out"
    return [Problem(key, f"{key} does nothing", why, fix) for key in dead]


def length_problems(training: TrainingConfig, facts: ModelFacts) -> list[Problem]:
    """A max_length that was asked for and that the model cannot read."""
    context = facts.context_length
    if training.max_length is None or not context or training.max_length <= context:
        return []
    what = f"{training.max_length} tokens are more than {facts.source} reads"
    return [Problem("max_length", what, f"its context is {context} tokens", f"max_length: {context}, or leave it out")]


def layer_problems(training: TrainingConfig, facts: ModelFacts) -> list[Problem]:
    """What is asked of single layers and does not fit this base."""
    found, asked = [], training.recompute_layers
    if isinstance(asked, int) and 0 < facts.layers < asked:
        fix = f"recompute_layers: {facts.layers}, or gradient_checkpointing: true"
        what = f"recompute_layers: {asked} is more than {facts.source} has"
        found.append(Problem("recompute_layers", what, f"it has {facts.layers}", fix))
    return found


def warmup_problems(training: TrainingConfig, steps: int | None) -> list[Problem]:
    """A warmup that the run never comes out of."""
    if steps is None or not training.warmup_steps or training.warmup_in_force(steps) < steps:
        return []
    what = f"warmup_steps: {training.warmup_steps:g} is the whole run"
    why = f"the run has {steps} step{'' if steps == 1 else 's'}, so the learning rate would never get to its peak"
    return [Problem("warmup_steps", what, why, "give fewer, or warmup_ratio: 0.1, or train longer")]


def streaming_problems(
    training: TrainingConfig, facts: ModelFacts, quantization: QuantizationConfig | None, device: str, dtype: str
) -> list[Problem]:
    """What stands against weights that stay in their files."""
    if not training.stream_weights:
        return []
    found, key = [], "stream_weights"
    if quantization is not None:
        why = "the weights in the base's files are not the quantized ones, which are made in memory"
        found.append(Problem(key, "stream_weights does not go with quantization", why, "drop one"))
    elif facts.stored not in ("", dtype):
        why = f"they are stored as {facts.stored}, and the run computes in {dtype}"
        fix = f"set dtype: {facts.stored}, or leave stream_weights out"
        found.append(Problem(key, "the weights cannot be streamed from their files", why, fix))
    for autocast, other in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(training, autocast, None) and dtype != other:
            what = f"{autocast} does not go with stream_weights over a base in {dtype}"
            why = f"autocast would keep every weight in {other} for the backward pass"
            found.append(Problem(autocast, what, why, f"leave {autocast} out, or take a base whose files are {other}"))
    if device == "mps" or sys.platform == "win32":
        where = "mps" if device == "mps" else "Windows"
        why = "weights are mapped from their files, on Linux and macOS, for a CPU or a CUDA GPU"
        fix = "leave it out, or set use_cpu: true" if device == "mps" else "leave it out"
        found.append(Problem(key, f"stream_weights does not work on {where}", why, fix))
    return found


def device_problems(training: TrainingConfig, device: str) -> list[Problem]:
    """What the device does not do."""
    found = []
    if training.offload_activations == "ram" and device == "cpu":
        found.append(
            Problem("offload_activations", "activations are in RAM already", "the run is planned on the CPU",
                    "offload_activations: disk, or leave it out")
        )  # fmt: skip
    if training.offload_activations == "disk" and sys.platform == "win32":
        found.append(
            Problem("offload_activations", "offload_activations: disk does not work on Windows",
                    "a file that is in use cannot be given back there", "ram, or leave it out")
        )  # fmt: skip
    if not device.startswith("cuda"):
        found += [
            Problem(key, f"{key} works on CUDA GPUs only", f"the run is planned on {device}", "leave it out")
            for key in ("fp16", "tf32")
            if getattr(training, key, None)
        ]
    return found


def batch_problems(training: TrainingConfig, train: int | None, evaluation: int | None) -> list[Problem]:
    """Too few rows for one batch, where incomplete batches are dropped."""
    if not getattr(training, "dataloader_drop_last", None):
        return []
    found = []
    for key, rows in (("per_device_train_batch_size", train), ("per_device_eval_batch_size", evaluation)):
        size = getattr(training, key)
        if rows and rows < size:
            why = f"{rows} rows do not fill a batch of {size} ({key})"
            fix = f"lower {key}, or leave dataloader_drop_last out"
            found.append(Problem("dataloader_drop_last", "every row would be dropped", why, fix))
    return found
