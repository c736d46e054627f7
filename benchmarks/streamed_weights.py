"""How little memory training takes when the frozen weights stay in their files (`training.stream_weights`).

    nox -s bench -- streamed_weights

Bases of random weights are written to a temporary folder, about 16 GB of them, and an adapter is trained on each for
two steps, in a process of its own: loaded as usual where that is bearable, and streamed. What is measured is the
process's own peak: Python, torch and everything else counted. About 15 minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from machine import processor, versions

RESULTS = Path(__file__).parent / "results"
TOKENS = 64  # of a row; 4 rows a step
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
ARMS = [("1B", False), ("1B", True), ("7B", True)]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="hyperion-streamed-") as folder:
        for shape in SHAPES:
            base = Path(folder) / shape
            print(f"writing {shape}", flush=True)
            size = write_base(base, SHAPES[shape])
            for streams in [streams for name, streams in ARMS if name == shape]:
                print(f"training {shape}, {'streamed' if streams else 'loaded'}", flush=True)
                rows.append({"base": shape, "bytes": size, "streamed": streams, **train(base, streams)})
                print(rows[-1], flush=True)
            shutil.rmtree(base)
    found = {"date": date.today().isoformat(), "device": processor(), "tokens a step": 4 * TOKENS,
             "versions": versions(("torch", "transformers", "peft", "safetensors")), "rows": rows}  # fmt: skip
    (RESULTS / "streamed-weights.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "streamed-weights.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def write_base(folder: Path, shape: dict[str, int]) -> int:
    """A Llama of random bfloat16 weights, a file a layer, and a tokenizer of bytes; gives the weights' bytes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from byte_tokenizer import byte_tokenizer
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir()
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16", pad_token_id=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    wide, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = wide // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (keys, wide), "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, wide), "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
    }  # fmt: skip
    ends = {"model.embed_tokens.weight": (shape["vocab_size"], wide), "lm_head.weight": (shape["vocab_size"], wide)}
    files = [{name: torch.randn(size).mul_(0.02).bfloat16() for name, size in ends.items()}]
    files[0]["model.norm.weight"] = torch.ones(wide, dtype=torch.bfloat16)
    index, total = {}, 0
    for number in range(-1, shape["num_hidden_layers"]):
        if number >= 0:
            prefix = f"model.layers.{number}"
            files.append({f"{prefix}.{n}.weight": torch.randn(s).mul_(0.02).bfloat16() for n, s in layer.items()})
            for norm in ("input_layernorm", "post_attention_layernorm"):
                files[-1][f"{prefix}.{norm}.weight"] = torch.ones(wide, dtype=torch.bfloat16)
        tensors, name = files.pop(), f"model-{number + 2:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")
    return total


def train(base: Path, streams: bool) -> dict[str, Any]:
    """Two steps of `hyperion train`: peak memory of the process, loss and seconds of each step."""
    work = Path(tempfile.mkdtemp(dir=base.parent))
    text = ("All that is gold does not glitter, not all those who wander are lost. ")[: TOKENS // 2]
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)), encoding="utf-8")
    config = {
        "base_model": str(base),
        "dataset": {"dataset": str(work / "rows.jsonl")},
        "adapter": {"type": "lora", "r": 16, "target_modules": ["q_proj", "v_proj"]},
        "audit": {"max_duplicates": 1.0},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": TOKENS, "pack_length": 4 * TOKENS,
                     "gradient_checkpointing": True, "stream_weights": streams, "logging_steps": 1,
                     "save_strategy": "no"},
    }  # fmt: skip
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "hyperion", "train", str(work / "config.json"), "--output-dir", str(work / "out")]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said)
    lines = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = [json.loads(line) for line in (work / "out" / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(work)
    return {
        "peak bytes": usage.ru_maxrss * 1024,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "tokens a second": [line.get("tokens_per_second") for line in timing],
        "whole command, seconds": round(time.perf_counter() - started, 1),
    }


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Weights that stay in their files", "",
        f"`python benchmarks/streamed_weights.py`, {found['date']}, {found['device']}, "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + ".", "",
        f"LoRA of rank 16 on q and v, {found['tokens a step']} tokens a step, every layer's activations computed "
        "again. The peak is the whole process's: Python, torch, weights, activations, optimizer. "
        "Memory is what is measured; the speeds are of single steps, with other work on the machine.", "",
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
    main()
