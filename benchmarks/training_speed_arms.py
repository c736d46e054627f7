"""One arm of `training_speed.py`, in a process of its own: reads a task, trains, writes what it measured.

    python benchmarks/training_speed_arms.py TASK.json RESULT.json

A task names the arm, the base model's folder, the rows (as ids and labels, and as Hyperion's own files), and the
settings that all arms share.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from machine import peak_bytes

#: What each variant of Hyperion leaves out, or has besides where its name begins with +: keys of `training:`, or a
#: change to the code, made in the process alone.
VARIANTS: Mapping[str, tuple[dict[str, Any], Callable[[], None] | None]]

Measured = dict[str, Any]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kind = task["arm"].partition(":")[0]
    measure = {"limit": limit, "plain": plain, "trl": trl, "hyperion": hyperion}[kind]
    measured = measure(task, task["arm"].partition(":")[2])
    measured["peak_bytes"] = peak_bytes()
    Path(sys.argv[2]).write_text(json.dumps(measured), encoding="utf-8")


# --- the machine ---


def limit(task: Mapping[str, Any], dtype: str) -> Measured:
    """GFLOP/s of matrix products of the model's own shapes, each weighted by its share of a training step's work."""
    import torch

    kind = getattr(torch, dtype)
    work = seconds = 0.0
    for out, into, share in task["shapes"]:
        rows = 128 if out > 20_000 else 512  # as the head is fed, and the layers
        x, weight = (torch.randn(n, into).to(task["device"], kind) for n in (rows, out))
        best = min(_seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight)) for _ in range(30))
        work += share
        seconds += share * best / (2 * rows * out * into)
    return {"gflops": work / seconds / 1e9, "flops_a_token": work}


def _seconds(call: Callable[[], Any]) -> float:
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    """For a GPU, which is told what to do and does it later."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- peers ---


def plain(task: Mapping[str, Any], dtype: str) -> Measured:
    """transformers.Trainer and peft, batches padded to their longest row."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    clock = _clock()
    model, tokenizer = _peft_model(task, dtype)
    arguments = TrainingArguments(
        **_shared(task), bf16=dtype == "bfloat16", per_device_train_batch_size=task["rows_a_step"],
        train_sampling_strategy="sequential",
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in task["rows"]]
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[clock])
    trainer.train()
    return _measured(task, clock, trainer)


def trl(task: Mapping[str, Any], variant: str) -> Measured:
    """TRL's SFTTrainer, rows packed by best fit without padding, as its documentation advises, and the step's packs one
    after another, which is faster here and takes less memory than side by side; activation checkpointing, its default,
    costs time where memory is not short: off, and on as a variant. Another is Liger's kernels, on a GPU."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    clock = _clock()
    model, tokenizer = _peft_model(task, task["dtype"])
    arguments = SFTConfig(
        **_shared(task), bf16=task["dtype"] == "bfloat16", packing=True, packing_strategy="bfd",
        max_length=task["pack_length"], per_device_train_batch_size=1, gradient_accumulation_steps=task["packs_a_step"],
        gradient_checkpointing=variant == "checkpointing", use_liger_kernel=variant == "liger", dataset_num_proc=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(task["rows"]), processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    return _measured(task, clock, trainer)


def _peft_model(task: Mapping[str, Any], dtype: str) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(task["base"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=getattr(torch, dtype))
    lora = LoraConfig(r=task["r"], lora_alpha=task["lora_alpha"], target_modules=task["target_modules"])
    return get_peft_model(model, lora), tokenizer


def _shared(task: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use_cpu": task["device"] == "cpu",
        "output_dir": tempfile.mkdtemp(), "num_train_epochs": 1, "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "seed": 0,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the loop's begin to its end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            _wait()
            self.started = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            _wait()
            self.seconds = time.perf_counter() - self.started

    return Clock()


def _measured(task: Mapping[str, Any], clock: Any, trainer: Any) -> Measured:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": clock.seconds, "tokens": task["tokens"], "losses": losses, "steps": trainer.state.global_step}


# --- Hyperion ---


def hyperion(task: Mapping[str, Any], variant: str) -> Measured:
    """`hyperion.Trainer` with everything that is on by default, or all but one thing, or one thing more."""
    from hyperion import FinetuneConfig, Trainer

    keys, change = VARIANTS[variant] if variant else ({}, None)
    if change is not None:
        change()
    config = FinetuneConfig.parse(
        {
            "base_model": task["base"],
            "dataset": {"dataset": task["file"]},
            "audit": {"allow": ["truncation", "duplicates"]},
            "adapter": {"type": "lora", "r": task["r"], "lora_alpha": task["lora_alpha"],
                        "target_modules": task["target_modules"]},
            "training": {
                "num_train_epochs": 1, "learning_rate": task["learning_rate"], "lr_scheduler": "constant",
                "per_device_train_batch_size": task["rows_a_step"], "max_length": task["max_length"],
                "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "seed": 0, **keys,
            },
        }
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    Trainer(config=config).train(output_dir=folder / "run")
    lines = _lines(folder / "run/metrics.jsonl")
    times = _lines(folder / "run/timing.jsonl")
    if lines[-1]["tokens"] != task["tokens"]:
        raise SystemExit(f"Hyperion trained on {lines[-1]['tokens']} tokens, and the others on {task['tokens']}")
    return {
        "seconds": times[-1]["seconds"], "tokens": task["tokens"], "losses": [line["loss"] for line in lines],
        "steps": lines[-1]["step"], "data_seconds": times[-1]["data_seconds"],
        "first step": {"seconds": times[0]["seconds"], "tokens": lines[0]["tokens"]},
    }  # fmt: skip


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _no_sharing() -> None:
    import hyperion.engine.fit as fit

    made = fit.Batching
    _replace(fit, "Batching", lambda *given, **named: made(*given, **{**named, "sharing": False}))


def _torch_attention() -> None:
    from hyperion.acceleration import attention

    _replace(attention._BlockedAttention, "apply", partial(attention.by_torch, dropout=0.0))


def _peft_layers() -> None:
    import hyperion_peft.attach as attach

    _replace(attach, "speed_up", lambda model: None)


def _loss_again() -> None:
    import hyperion.engine.loss as loss

    _replace(loss, "Linear", type(None))  # no head is taken for a plain one


def _compiled_layers() -> None:
    import torch
    from transformers import AttentionInterface

    from hyperion.acceleration import attention
    from hyperion.engine.engine import Engine

    # how a pack is attended to depends on its documents: that part stays as it is
    AttentionInterface.register(attention.NAME, torch._dynamo.disable(attention.document_attention))
    _replace(attention, "register", lambda: None)
    settled = Engine.settle_packing

    def settle_and_compile(self: Any, *given: Any, **named: Any) -> None:
        settled(self, *given, **named)
        for module in self.model.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                module.forward = torch.compile(module.forward, dynamic=True)

    _replace(Engine, "settle_packing", settle_and_compile)


def _replace(owner: Any, name: str, by: Any) -> None:
    """Of what is there: a name that has moved would be measured as if nothing had been changed."""
    getattr(owner, name)
    setattr(owner, name, by)


VARIANTS = {
    "packing": ({"packing": False}, None),
    "sharing": ({}, _no_sharing),
    "blocked attention": ({}, _torch_attention),
    "fused layers": ({"fused_layers": False}, None),
    "LoRA layers": ({}, _peft_layers),
    "gradient with the loss": ({}, _loss_again),
    "+all layers recomputed": ({"recompute_layers": 30}, None),
    "+activations on disk": ({"offload_activations": "disk"}, None),
    "+activations in RAM": ({"offload_activations": "ram"}, None),
    "+optimizer in 8 bits": ({"optim": "adamw_bnb_8bit"}, None),
    "+compiled layers": ({}, _compiled_layers),
}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
