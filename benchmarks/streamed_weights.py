"""How little memory training takes when the frozen weights stay in their files (`training.stream_weights`).

    nox -s bench -- streamed_weights

Bases of random weights are written to a temporary folder, about 16 GB of them, and an adapter is trained on each for
two steps, in a process of its own: loaded as usual where that is bearable, and streamed. What is measured is the
process's own peak: Python, torch and everything else counted; on a GPU, which has a page of its own, that of torch's
tensors there. About 15 minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from machine import peak_bytes, processor, versions
from random_bases import SHAPES, write_base

from hyperion.models.hardware import plan_device

RESULTS = Path(__file__).parent / "results"
TOKENS = 64  # of a row; 4 rows a step
ARMS = {"cpu": [("1B", False), ("1B", True), ("7B", True)],
        "cuda": [("1B", False), ("1B", True), ("7B", False), ("7B", True)]}  # fmt: skip


def main() -> None:
    device = plan_device()
    rows = []
    with tempfile.TemporaryDirectory(prefix="hyperion-streamed-") as folder:
        for shape in SHAPES:
            base = Path(folder) / shape
            print(f"writing {shape}", flush=True)
            size = write_base(base, SHAPES[shape], bytes_tokenizer(Path(folder)))
            for streams in [streams for name, streams in ARMS[device] if name == shape]:
                print(f"training {shape}, {'streamed' if streams else 'loaded'}", flush=True)
                rows.append({"base": shape, "bytes": size, "streamed": streams, **train(base, streams)})
                print(rows[-1], flush=True)
            shutil.rmtree(base)
    found = {"date": date.today().isoformat(), "device": processor(), "tokens a step": 4 * TOKENS,
             "versions": versions(("torch", "transformers", "peft", "safetensors")), "rows": rows}  # fmt: skip
    name = "streamed-weights" if device == "cpu" else f"streamed-weights-{device}"
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def bytes_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer of bytes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from byte_tokenizer import byte_tokenizer

    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def train(base: Path, streams: bool) -> dict[str, Any]:
    """Two steps of `hyperion train`: peak memory of the process, loss and seconds of each step."""
    work = Path(tempfile.mkdtemp(dir=base.parent))
    text = ("All that is gold does not glitter, not all those who wander are lost. ")[: TOKENS // 2]
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)), encoding="utf-8")
    config = {
        "base_model": str(base),
        "dtype": "bfloat16",  # as the weights are stored, whatever is faster here
        "dataset": {"dataset": str(work / "rows.jsonl")},
        "adapter": {"type": "lora", "r": 16, "target_modules": ["q_proj", "v_proj"]},
        "audit": {"max_duplicates": 1.0},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": TOKENS, "pack_length": 4 * TOKENS,
                     "gradient_checkpointing": True, "stream_weights": streams, "logging_steps": 1,
                     "save_strategy": "no"},
    }  # fmt: skip
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, __file__, "--run", str(work / "config.json"), str(work / "out")]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    lines = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = [json.loads(line) for line in (work / "out" / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = int((work / "out/peak").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    return {
        "peak bytes": peak,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "tokens a second": [line.get("tokens_per_second") for line in timing],
        "whole command, seconds": round(time.perf_counter() - started, 1),
    }


def run(config: str, out: str) -> None:
    """One training, in this process."""
    from hyperion import FinetuneConfig, Trainer

    Trainer(FinetuneConfig.from_file(config)).train(output_dir=out)
    Path(out, "peak").write_text(str(peak_bytes()), encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Weights that stay in their files", "",
        f"`python benchmarks/streamed_weights.py`, {found['date']}, {found['device']}, "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + ".", "",
        f"LoRA of rank 16 on q and v, {found['tokens a step']} tokens a step, every layer's activations computed "
        "again. The peak is the whole process's: Python, torch, weights, activations, optimizer; on a GPU, torch's "
        "tensors there. Memory is what is measured; the speeds are of single steps, with other work on the machine.",
        "",
        "| base | its weights | | peak memory | first and second step's loss | tokens/s in the second |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in found["rows"]:
        lines.append(
            f"| {row['base']} | {row['bytes'] / 1e9:.2f} GB | {'streamed' if row['streamed'] else 'loaded'} | "
            f"{row['peak bytes'] / 1e9:.2f} GB | {row['losses'][0]:.4f}, {row['losses'][1]:.4f} | "
            f"{row['tokens a second'][-1]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(*sys.argv[2:]) if sys.argv[1:2] == ["--run"] else main()
