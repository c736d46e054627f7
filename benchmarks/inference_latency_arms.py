"""What `inference_latency.py` measures: a tuned model in several forms, its latency, bytes on disk, and quality."""

from __future__ import annotations

import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_bits_measures import BASE, Bench, cache_dir, load_tokenizer, materialize, resolve_source

if TYPE_CHECKING:
    from torch import Tensor

PROMPT, NEW = 64, 64  # tokens
_FEW = 8  # new tokens of arms that take their time
_STEPS, _ROWS_A_STEP = 60, 4  # of training
_DISTILL_STEPS = 100
_REPEATS = 3  # inside one process, after one that warms up
#: Of the package, in bytes of the merged model in float16; 1% less than is promised is left for the file's header.
_SHARE = 0.2575


@dataclass(frozen=True)
class Arm:
    """A form in which the tuned model answers. `quantization`: what the merged one is quantized with, "" for one that
    is not; `new`: tokens that are generated."""

    what: str
    dtype: str = "bfloat16"
    merged: bool = True
    quantization: str = ""
    compiled: bool = False
    new: int = NEW

    @property
    def weights(self) -> tuple[bool, str]:
        """Arms that have the same answer with the same quality."""
        return self.merged, self.quantization


ARMS: Mapping[str, Arm] = {
    "unmerged float32": Arm("base and adapter apart, peft's `PeftModel`", "float32", merged=False),
    "unmerged bfloat16": Arm("the same", merged=False),
    "merged float32": Arm("`hyperion merge`", "float32"),
    "merged bfloat16": Arm("`hyperion merge`"),
    "merged bfloat16, compiled": Arm("the same, `load_standalone(…, compiled=True)`", compiled=True),
    "package": Arm(
        "`hyperion quantize`: gptq, bits: auto, embeddings in 4 bits, scales that learn", quantization="package"
    ),
    "package, compiled": Arm("the same, `load_standalone(…, compiled=True)`", quantization="package", compiled=True),
    "package, scales as rounded": Arm("the package's bits, without `distill_steps`", quantization="rounded"),
    "gptq": Arm("`hyperion quantize`: gptq, 4 bits", quantization="gptq"),
    "torchao": Arm("`hyperion quantize`: torchao, 4 bits", quantization="torchao", new=_FEW),
    "bnb": Arm("`hyperion quantize`: bnb, nf4", quantization="bnb", new=_FEW),
}


class TunedBench(Bench):
    """The text of `Bench`, and a model that is tuned once, with LoRA of rank 16 on q and v, and merged."""

    @cached_property
    def run(self) -> Path:
        """The output folder of a finished run."""
        from hyperion import FinetuneConfig, Trainer
        from hyperion.data import DatasetProcessor

        folder = self.folder / f"run-{_STEPS}"
        if folder.exists() and not (folder / "adapter_model.safetensors").exists():
            shutil.rmtree(folder)  # of a process that was killed
        if not folder.exists():
            config: dict[str, Any] = {
                "base_model": str(self.untuned),
                "adapter": {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
                "training": {
                    "max_steps": _STEPS, "per_device_train_batch_size": _ROWS_A_STEP, "learning_rate": 1e-3,
                    "gradient_accumulation_steps": 1, "max_length": self.max_length, "eval_samples": 0, "seed": 0,
                    "use_cpu": True,
                },
            }  # fmt: skip
            train, _ = DatasetProcessor(dataset=self.whole_chats("training")).prepare()
            Trainer(FinetuneConfig(**config)).train(train, output_dir=folder)
        return folder

    @cached_property
    def untuned(self) -> Path:
        return materialize(resolve_source(BASE), cache_dir(), print)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.untuned)  # there before the merged model is

    @cached_property
    def base(self) -> Path:
        """The merged model, in float16: what everything is compared with."""
        from hyperion.exporting import export_merged

        folder = self.folder / f"merged-{_STEPS}"
        if not folder.exists():
            export_merged(self.run, folder, into="float16")
        return folder

    def options(self, quantization: str) -> dict[str, Any]:
        """What stands below `quantization:`."""
        calibration = self.calibration(0).model_dump()
        package = {"method": "gptq", "embedding_bits": 4, "calibration": calibration}
        if quantization == "package":
            budget = _SHARE * weight_bytes(self.base) / 1e6
            return {**package, "bits": "auto", "group_size": 64, "budget_mb": round(budget, 2),
                    "distill_steps": _DISTILL_STEPS}  # fmt: skip
        if quantization == "rounded":
            return {**package, "bit_plan": str(self.checkpoint("package") / "bit_plan.json")}
        if quantization == "gptq":
            return {"method": "gptq", "bits": 4, "group_size": 64, "calibration": calibration}
        return {"method": quantization, "bits": 4, "group_size": 64}

    def checkpoint(self, quantization: str) -> Path:
        """The folder that is loaded."""
        from hyperion.quantizing import quantize

        if not quantization:
            return self.base
        folder = self.folder / f"{quantization}-{_STEPS}"
        if not folder.exists():
            quantize(str(self.base), self.options(quantization), output_dir=folder)
        return folder

    def disk(self, name: str) -> int:
        """Bytes of the weights that this arm needs on disk."""
        arm = ARMS[name]
        if arm.merged:
            return weight_bytes(self.checkpoint(arm.quantization))
        return weight_bytes(self.base) + (self.run / "adapter_model.safetensors").stat().st_size

    def load(self, name: str, dtype: str = "") -> Any:
        """As it answers; not compiled, in another `dtype`, where one is given."""
        import torch

        arm = ARMS[name]
        compiled, dtype = arm.compiled and not dtype, dtype or arm.dtype
        if arm.merged:
            from hyperion.models import load_standalone

            return load_standalone(self.checkpoint(arm.quantization), dtype=dtype, compiled=compiled).model
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.untuned, dtype=getattr(torch, dtype))
        return PeftModel.from_pretrained(base, self.run).eval()

    def prompt(self) -> Tensor:
        """Token ids (1, PROMPT) of held-out text."""
        import torch

        return torch.cat([ids for ids, _ in self.evaluated])[:PROMPT][None]


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def latency(bench: TunedBench, name: str) -> dict[str, float]:
    """Of one arm, in this process. "prompt": ms until the first token; "token": ms for each that follows;
    "start": seconds from the files to the end of a first answer, compiling included; "memory": MB at its peak."""
    import torch

    arm, ids = ARMS[name], bench.prompt()
    started = time.perf_counter()
    with torch.inference_mode():
        model = bench.load(name)
        answer = _generate(model)
        answer(ids, arm.new)
        start = time.perf_counter() - started
        prompts, tokens = [], []
        for _ in range(_REPEATS):
            first = _seconds(answer, ids, 1)
            prompts.append(first)
            tokens.append((_seconds(answer, ids, arm.new) - first) / (arm.new - 1))
    scale = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    return {"prompt": 1e3 * statistics.median(prompts), "token": 1e3 * statistics.median(tokens), "start": start,
            "memory": peak}  # fmt: skip


def _seconds(answer: Callable[[Tensor, int], None], ids: Tensor, new: int) -> float:
    started = time.perf_counter()
    answer(ids, new)
    return time.perf_counter() - started


def _generate(model: Any) -> Callable[[Tensor, int], None]:
    # Nothing ends an answer early. `min_new_tokens` would look through the vocabulary for each token, 3 ms here.
    model.generation_config.eos_token_id = None

    def answer(ids: Tensor, new: int) -> None:
        out = model.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert out.shape[1] == ids.shape[1] + new

    return answer
