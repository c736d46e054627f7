"""One training run of the memory benchmark, in a process of its own; prints what it held.

    python benchmarks/memory_prediction_runs.py '{"size": "30M", ...}'

What is measured is resident memory (VmHWM, reset through /proc/self/clear_refs) above what the process held just before
the weights load. A run of a tiny model goes before, so that libraries, and what they set up at their first use, count
as the process and not as the model.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "warmup": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "14M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5,
            "num_key_value_heads": 5, "vocab_size": 8192, "tie_word_embeddings": False},
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": 24000, "tie_word_embeddings": True},
    "50M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "200M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 24, "num_attention_heads": 12,
             "num_key_value_heads": 4, "vocab_size": 40000, "tie_word_embeddings": True},
    "300M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "4 bits": {"method": "bnb", "bits": 4},
    "8 bits": {"method": "torchao", "bits": 8},
}
MOVED: dict[str, dict[str, Any]] = {
    "activations on disk": {"offload_activations": "disk"},
    "weights streamed": {"stream_weights": True},
}


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))


def start_anew() -> None:
    """VmHWM begins again at what is resident now; memory that malloc only keeps goes back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def write_base(folder: Path, size: str, dtype: str) -> None:
    """A Llama of random weights, stored in the type that it trains in, and a tokenizer of bytes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from byte_tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[size], pad_token_id=0, max_position_embeddings=4096)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def training_of(run: dict[str, Any]) -> dict[str, Any]:
    """The config's `training:`."""
    return {"max_steps": 2, "per_device_train_batch_size": run["documents"],
            "max_length": run["tokens"] // run["documents"], "pack_length": run["tokens"],
            "gradient_checkpointing": run["checkpointing"], "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
            **MOVED.get(run.get("moved", ""), {})}  # fmt: skip


def train(base: Path, work: Path, run: dict[str, Any]) -> None:
    """Two optimizer steps of one full pack each, through the public pipeline."""
    from hyperion.config import FinetuneConfig
    from hyperion.pipeline import run as run_pipeline

    tokens, count = run["tokens"] // run["documents"], run["documents"]
    letters = random.Random(0)
    texts = ["".join(letters.choices(string.ascii_letters, k=tokens + 8)) for _ in range(2 * count)]
    (work / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    data: dict[str, Any] = {
        "base_model": str(base),
        "dtype": run["dtype"],
        "dataset": {"dataset": str(work / "rows.jsonl"), "format": "text"},
        "adapter": {"type": "lora", "r": run["r"], "target_modules": run["targets"]},
        "audit": {"max_duplicates": 1.0},
        "training": training_of(run),
    }
    if METHODS[run["method"]]:
        data["quantization"] = METHODS[run["method"]]
    run_pipeline(FinetuneConfig.parse(data), output_dir=work / "out")


def main() -> None:
    run = json.loads(sys.argv[1])
    from hyperion import pipeline

    with tempfile.TemporaryDirectory(prefix="hyperion-memory-") as folder:
        bases = Path(folder) / "warmup", Path(folder) / "base"
        write_base(bases[0], "warmup", run["dtype"])
        write_base(bases[1], run["size"], run["dtype"])
        works = [Path(folder) / name for name in ("first", "second")]
        for work in works:
            work.mkdir()
        train(bases[0], works[0], {**run, "tokens": 64, "documents": 2})
        found: dict[str, int] = {}
        load = pipeline.load_base

        def measured(*args: Any, **kwargs: Any) -> Any:
            start_anew()
            found["before"] = resident("VmRSS")
            model = load(*args, **kwargs)
            found["loading"] = resident("VmHWM") - found["before"]
            start_anew()
            found["loaded"] = resident("VmRSS") - found["before"]
            return model

        pipeline.load_base = measured
        train(bases[1], works[1], run)
        found["training"] = resident("VmHWM") - found["before"]
    found["peak"] = max(found["loading"], found["training"])
    print("\n" + json.dumps({"run": run, "bytes": found}))


if __name__ == "__main__":
    main()
