"""From a run's folder to a model that stands alone: merged, saved, loaded again, and compared before it is let out."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hyperion_core.artifact import Artifact, read_json, write_json
from hyperion_core.config import QuantizationConfig
from hyperion_core.context import Progress, RunContext
from hyperion_core.errors import ArtifactError
from hyperion_core.facts import BitPlan, QuantInfo
from hyperion_core.plan import Plan
from hyperion_core.specs import QuantizerSpecs

from .governance.model_card import merged_card
from .models.cache import cache_dir
from .models.facts import read_config
from .models.hardware import DTYPES
from .models.quiet import quiet_transformers
from .models.source import resolve_source
from .new_folder import new_folder
from .output import PLAN
from .quantization.existing import unknown_format
from .quantization.parity import (
    DEFAULT_TEXTS,
    FORMAT_TOLERANCE,
    PARITY,
    Parity,
    ParityTolerance,
    Reference,
    logits_of,
    loosest,
    mean_bits,
    parity,
    quantized_tolerance,
    refuse_limits,
)

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

    from .models.tuned import TunedModel
    from .quantization.merging import Target

log = logging.getLogger("hyperion")
_HEADER = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Export:
    """What was written: the folder, how its weights are held ("float16", "4 bits by bnb"), and how near it is to base
    and adapter apart. `unknown_format` is that of its quantization, where plain transformers does not know it."""

    folder: Path
    held: str
    parity: Parity
    tolerance: ParityTolerance
    unknown_format: str = ""


def export_merged(
    run: str | Path,
    output_dir: str | Path,
    *,
    into: Target | None = None,
    base_model: str | None = None,
    prompts: Sequence[str] | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    progress: Progress | None = None,
) -> Export:
    """Merge a run's adapter into its base, and leave a model that needs neither, with its tokenizer, in `output_dir`.

    It is loaded again as anybody would load it, and compared with base and adapter apart. What is too far away is not
    let out: then `output_dir` is as it was.

    Args:
        run: the `output_dir` of a finished run.
        output_dir: a folder that does not exist yet.
        into: "float16", "bfloat16" or "float32": a plain transformers model; or "quantized": by the base's own method,
            in its own bits. None is float16 for a quantized base, and else the number format of the base.
        base_model: where the base lies now, if not where it was.
        prompts: texts to compare on; None takes the run's samples and some plain text.
        max_kl, min_top1: how far away it may be, in place of what is usual for such a change: mean KL divergence in
            nats a token, and the share of positions with the same likeliest token.

    Raises:
        HyperionError: the run cannot be read or merged, the result is too far away, or the folder cannot be written.
    """
    refuse_limits(max_kl, min_top1)
    artifact = Artifact.read(run)
    with new_folder(Path(output_dir), "the merged model") as folder:
        from .models.hardware import actual_device
        from .models.load import load_model, load_tokenizer
        from .models.tuned import load_tuned
        from .quantization.merging import merge, quantizer_of, refuse_unmergeable

        base = _base_folder(artifact, base_model)
        method = quantizer_of(artifact)
        # What a quantizer computes in decides what its modules hold: that of the training.
        dtype = str(read_json(artifact.folder / PLAN).get("dtype", "float32")) if method else _own_dtype(base)
        target = into or ("float16" if method else cast("Target", dtype))
        tuned = load_tuned(artifact.folder, base_model=str(base), dtype=dtype)
        refuse_unmergeable(tuned, artifact, target)
        texts = list(prompts) if prompts is not None else [*_samples(artifact), *DEFAULT_TEXTS]
        before = logits_of(tuned.model, tuned.tokenizer, texts, progress, "the tuned model")
        effect = _effect(tuned, before, texts, progress)
        tokenizer, quantized = tuned.tokenizer, None
        merged = merge(tuned, artifact, into=target, progress=progress)
        if target == "quantized":
            quantized = _Quantized.of(merged, tuned, artifact, dtype)
            quantized.save(merged, folder)
        else:
            _save_plain(merged, folder)
        del tuned, merged
        gc.collect()  # adapters and their modules refer to each other
        tokenizer.save_pretrained(folder)
        _readable_by_others(folder)
        reloaded = quantized.load(folder) if quantized else load_model(folder, dtype=target, device=actual_device())
        after = logits_of(reloaded, load_tokenizer(folder), texts, progress, "the merged model")
        figures = replace(parity(before, after), effect=effect)
        tolerance = _tolerance(target, dtype, method, quantized).changed(max_kl, min_top1)
        figures.check(tolerance, "the merged model")
        held = quantized.described() if quantized else target
        compared = {
            "compared": "the merged model with base and adapter apart",
            "figures": figures.as_data(),
            "tolerance": {"mean_kl": tolerance.most(effect), "top1": tolerance.top1},
            "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        }
        write_json(folder / PARITY, compared)
        unknown = unknown_format(folder)
        card = merged_card(artifact, held, compared, unknown_format=unknown)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Export(Path(output_dir), held, figures, tolerance, unknown)


@dataclass(frozen=True)
class _Quantized:
    """How a base is held that was quantized again."""

    quantizer: QuantizerSpecs
    config: QuantizationConfig
    modules: Mapping[str, QuantInfo]
    dtype: str

    @classmethod
    def of(cls, model: Module, tuned: TunedModel, artifact: Artifact, dtype: str) -> _Quantized:
        from .quantization.merging import quantization_of

        config = quantization_of(tuned, artifact)
        assert config is not None
        quantizer = tuned.hooks.quantizer(str(config.method))
        return cls(quantizer, config, quantizer.quantizer_modules(model=model), dtype)

    def save(self, model: Module, folder: Path) -> None:
        with quiet_transformers():
            self.quantizer.quantizer_save(model=model, config=self.config, folder=folder)

    def load(self, folder: Path) -> Module:
        """From its files alone, by the method's own library."""
        from .models.hardware import actual_device
        from .models.load import load_model

        bits = BitPlan(16, 0, {name: (info.bits, info.group_size) for name, info in self.modules.items()})
        device = actual_device()
        plan = Plan(config={}, choices=(), device=device, dtype=self.dtype)
        ctx = RunContext(plan=plan, seed=0, device=device, output=folder, cache=cache_dir())
        options = self.quantizer.quantizer_load_kwargs(source=folder, config=self.config, bits=bits, ctx=ctx)
        model = load_model(folder, dtype=self.dtype, device=device, load_kwargs=options)
        return self.quantizer.quantizer_after_load(model=model, config=self.config, bits=bits, training=False)

    def described(self) -> str:
        widths = sorted({info.bits for info in self.modules.values()}) or [16]
        return f"{widths[0]}{f' to {widths[-1]}' if len(widths) > 1 else ''} bits by {self.config.method}"


def _tolerance(target: str, dtype: str, method: str | None, quantized: _Quantized | None) -> ParityTolerance:
    """What is usual: rounding of the weights to the result's format, and of what is computed in either format. A
    quantizer's own kernels compute in half precision, whatever the rest does."""
    if quantized is not None:
        return quantized_tolerance(mean_bits(quantized.modules))
    return loosest(*(FORMAT_TOLERANCE[each] for each in (target, dtype, *(["float16"] if method else []))))


def _effect(tuned: TunedModel, before: Reference, texts: Sequence[str], progress: Progress | None) -> float:
    """Mean KL divergence between the tuned model and its base, in nats a token."""
    tuned.use_adapter(False)
    effect = parity(before, logits_of(tuned.model, tuned.tokenizer, texts, progress, "its base")).mean_kl
    tuned.use_adapter(True)
    return effect


def _base_folder(artifact: Artifact, base_model: str | None) -> Path:
    from .models.load import materialize

    if base_model is not None:
        source = resolve_source(base_model)
    else:
        known = artifact.adapter
        source = resolve_source(str(known["base_model"]), known.get("revision"), artifact.folder)
    return materialize(source, cache_dir(), log.info)


def _own_dtype(base: Path) -> str:
    """The number format that a model folder says it is in, or else that of its weights; float32 for any other."""
    from safetensors import safe_open

    config = read_config(base)
    said = config.get("dtype") or config.get("torch_dtype")
    if said is None:
        with safe_open(min(base.glob("*.safetensors")), framework="np") as file:
            said = _HEADER.get(file.get_slice(next(iter(file.keys()))).get_dtype())
    return said if said in DTYPES else "float32"


def _samples(artifact: Artifact) -> list[str]:
    """What the run showed of its evaluation data: prompts and expected answers."""
    file = artifact.folder / "samples.jsonl"
    if not file.exists():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return list(dict.fromkeys(f"{row['prompt']} {row['expected']}" for row in rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "restore the file from the run, or name other texts: --prompts"
        raise ArtifactError(f"{file} cannot be read", why=str(error), fix=fix) from error


def _save_plain(model: PreTrainedModel, folder: Path) -> None:
    """As transformers does, but for the generation config, which is kept as it is: transformers refuses to save some
    that it loads, and that models were published with."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    with quiet_transformers():
        model.save_pretrained(folder)
    if kept is not None:
        kept.to_json_file(folder / "generation_config.json")


def _readable_by_others(folder: Path) -> None:
    """safetensors writes for the owner alone, whatever the umask says."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)
