"""`quantize`: a model's folder to a checkpoint in fewer bits, which its method's own library loads.

What is written is loaded again, and compared with the model that it was made of, before the folder appears.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hyperion_core.artifact import write_json
from hyperion_core.config import QuantizationConfig, problems_of
from hyperion_core.context import NoProgress, Progress, RunContext
from hyperion_core.errors import ArtifactError, CompatibilityError, ConfigError, Problem
from hyperion_core.facts import ModelFacts
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Quantizer
from hyperion_core.plan import Choice, Plan
from hyperion_core.registry import registry
from pydantic import ValidationError

from .governance.model_card import public_name
from .governance.quantized_card import options_for_others, quantized_card
from .models.cache import cache_dir, check_caches
from .models.check import check_base
from .models.facts import model_facts
from .models.hardware import choose_dtype, plan_device
from .models.quiet import quiet_transformers
from .models.source import BaseModelSource, resolve_source
from .new_folder import new_folder
from .planning import versions
from .planning_hooks import PlanningHooks
from .quantization.choice import choose_method
from .quantization.existing import reader_of, recognized, saved_quantization, unknown_format
from .quantization.parity import (
    DEFAULT_TEXTS,
    PARITY,
    Parity,
    ParityTolerance,
    Reference,
    logits_of,
    mean_bits,
    parity,
    quantized_tolerance,
    refuse_limits,
)
from .quantization.planning import PlannedBits, planned_bits

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from .quantization.calibration import CalibrationRows

log = logging.getLogger("hyperion")
#: Of the folder: how it was made.
RECORD = "quantized.json"
_SEED = 0


@dataclass(frozen=True)
class Quantized:
    """A finished checkpoint. Bytes are (before, after): `disk` of the weights' files, `memory` of the loaded model.
    `plain`: transformers loads it without Hyperion."""

    folder: Path
    method: str
    options: Mapping[str, Any]
    disk: tuple[int, int]
    memory: tuple[int, int]
    parity: Parity
    seconds: float
    plain: bool = True

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "folder": str(self.folder),
            "method": self.method,
            "options": dict(self.options),
            "bytes_on_disk": dict(zip(("before", "after"), self.disk, strict=True)),
            "bytes_in_memory": dict(zip(("before", "after"), self.memory, strict=True)),
            "parity": self.parity.as_data(),
            "seconds": round(self.seconds, 1),
        }


def quantize(
    model: str,
    options: Mapping[str, Any],
    *,
    output_dir: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    max_kl: float | None = None,
    min_top1: float | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a model into a new folder: weights, tokenizer, parity.json, and bit_plan.json where bits are by module.

    Args:
        model: a hub id, a folder, a GGUF file, or package://module/file.
        options: what may stand below `quantization:` in a config.
        output_dir: a folder that does not exist yet, or is empty.
        dtype: "auto", "float32", "bfloat16" or "float16": of what is not quantized, and of the model before.
        max_kl, min_top1: how far the answers may be from those before: nats a token, share of equal likeliest tokens.
            By default what is written is refused when it is twice as far away as is usual for so many bits.

    Raises:
        ConfigError: with every problem of the options at once, before anything heavy is loaded.
        HyperionError: the model cannot be had or is quantized already, the data cannot be had, the folder is taken or
            cannot be written, or the checkpoint answers otherwise than it may.
    """
    started, progress = time.monotonic(), progress or NoProgress()
    refuse_limits(max_kl, min_top1)
    config = _config(options)
    source = resolve_source(model, revision)
    facts = _checked(source)
    hooks, plugin, choice = _quantizer(config)
    _refuse_write_only(plugin, config)
    guess = plan_device()
    _refuse(config, plugin, hooks, facts, guess, choose_dtype(dtype, guess))
    with new_folder(Path(output_dir), "the quantized model") as folder:
        check_caches()
        ctx = _context(choice, dtype, folder, progress)
        base, facts = _base(source, facts, ctx)
        bits = _refuse(config, plugin, hooks, facts, ctx.device, ctx.plan.dtype)
        rows, tokenizer = _rows(base, config, plugin, bits, facts, ctx)
        before, memory = _before(base, tokenizer, ctx)
        _write(base, config, hooks, bits, rows, tokenizer, ctx)
        after, memory_after, mean = _after(folder, config, plugin, hooks, facts, ctx)
        found, tolerance = _compared(before, after, mean, max_kl, min_top1)
        done = Quantized(
            folder=Path(output_dir).expanduser().absolute(),
            method=choice.name,
            options=config.model_dump(mode="json", exclude_none=True),
            disk=(_weights(source.path if source.kind == "gguf" and source.path else base), _weights(folder)),
            memory=(memory, memory_after),
            parity=found,
            seconds=time.monotonic() - started,
            plain=not unknown_format(folder),
        )
        _record(done, tolerance, model, source, choice, rows, ctx)
    return done


# --- what can be said before anything is loaded ---


def _config(options: Mapping[str, Any]) -> QuantizationConfig:
    """The chosen quantizer's own config."""
    given, why = {key: value for key, value in options.items() if value is not None}, ""
    if given.get("method") is None:
        try:
            given["method"], why = choose_method(given)
        except ValidationError as error:
            raise ConfigError(problems_of(error), source="hyperion quantize") from error
    config_class = registry().load("quantizer", str(given["method"])).config_class
    return cast(QuantizationConfig, config_class.parse(given, source="hyperion quantize")).chosen_because(why)


def _checked(source: BaseModelSource) -> ModelFacts:
    """What is known of the model, where it is here.

    Raises:
        CompatibilityError: it is quantized already.
    """
    facts = model_facts(source)
    check_base(source, facts, trust_remote_code=False)
    if source.path is not None and source.kind != "gguf":
        _refuse_quantized(source.path, source.name)
    return facts


def _refuse_quantized(folder: Path, name: str) -> None:
    if saved := saved_quantization(folder):
        method = str(saved["quant_method"])
        reader = reader_of(method)
        raise CompatibilityError(
            f'{name} is quantized already, by "{method}"',
            why="what rounding took away does not come back: a second rounding adds its error to the first",
            fix="start from the unquantized model"
            + (f"; to train on this one, name it as base_model: {reader} loads it" if reader else ""),
        )


def _quantizer(config: QuantizationConfig) -> tuple[RunHooks, Quantizer, Choice]:
    method = str(config.method)
    hooks, plugin = RunHooks(), cast(Quantizer, registry().create("quantizer", method))
    hooks.add(plugin, method)
    return hooks, plugin, Choice.of(registry().find("quantizer", method))


def _refuse(
    config: QuantizationConfig, plugin: Quantizer, hooks: RunHooks, facts: ModelFacts, device: str, dtype: str
) -> PlannedBits:
    """The bits of each module.

    Raises:
        ConfigError: with every problem of the options on this model and device.
    """
    problems: list[Problem] = []
    bits = planned_bits(config, None, PlanningHooks(hooks), facts, None, device, dtype, problems)
    if _measures(plugin, bits) and (config.calibration is None or config.calibration.dataset is None):
        reason = (
            "bits: auto weighs each module on it" if bits and bits.known is None else f"{config.method} rounds by it"
        )
        fix = "name some: --calibration FILE (a path, a hub id, or package://module/file)"
        problems.append(Problem("calibration", "there is no data to measure on", reason, fix))
    if problems:
        named = [replace(problem, path=problem.path.removeprefix("quantization").lstrip(".")) for problem in problems]
        raise ConfigError(named, source="hyperion quantize")
    assert bits is not None
    return bits


def _refuse_write_only(plugin: Quantizer, config: QuantizationConfig) -> None:
    if not plugin.provides.reads:
        raise CompatibilityError(
            f'"{config.method}" cannot make a checkpoint that stands alone',
            why="its plugin loads none (provides.reads is empty), so that nothing could be compared, nor used",
            fix=f"train on top, with quantization.method: {config.method} in a config, or choose another method",
        )


def _measures(plugin: Quantizer, bits: PlannedBits | None) -> bool:
    return plugin.provides.calibration or (bits is not None and bits.known is None)


# --- the work ---


def _context(choice: Choice, dtype: str, folder: Path, progress: Progress) -> RunContext:
    from transformers import set_seed

    from .models.hardware import actual_device

    set_seed(_SEED)
    device = actual_device()
    plan = Plan(
        config={}, choices=(choice,), device=device, dtype=choose_dtype(dtype, device), versions=versions([choice])
    )
    return RunContext(plan=plan, seed=_SEED, device=device, output=folder, cache=cache_dir(), progress=progress)


def _base(source: BaseModelSource, facts: ModelFacts, ctx: RunContext) -> tuple[Path, ModelFacts]:
    """The model as a folder, and what is known of it now."""
    from .models.load import materialize

    base = materialize(source, ctx.cache, ctx.log.info)
    _refuse_quantized(base, source.name)
    return base, facts if facts.known else model_facts(resolve_source(str(base)))


def _rows(
    base: Path, config: QuantizationConfig, plugin: Quantizer, bits: PlannedBits, facts: ModelFacts, ctx: RunContext
) -> tuple[CalibrationRows | None, PreTrainedTokenizerBase]:
    """What is measured on, where something is; and the tokenizer."""
    from .models.load import load_tokenizer
    from .quantization.calibration import named_rows, refuse_too_short

    tokenizer = load_tokenizer(base)
    if not _measures(plugin, bits):
        return None, tokenizer
    assert config.calibration is not None
    rows = named_rows(config.calibration, tokenizer, None, ctx.cache, ctx.progress)
    refuse_too_short(rows, facts)
    ctx.log.info("calibration: %d rows, %d tokens", len(rows), sum(row["input_ids"].numel() for row in rows))
    return rows, tokenizer


def _before(base: Path, tokenizer: PreTrainedTokenizerBase, ctx: RunContext) -> tuple[Reference, int]:
    """What the model says before, and its bytes in memory; it is let go of."""
    from .models.load import load_model
    from .quantization.resident import base_bytes

    model = load_model(base, dtype=ctx.plan.dtype, device=ctx.device).requires_grad_(False)
    found = logits_of(model, tokenizer, DEFAULT_TEXTS, ctx.progress, "the model before"), base_bytes(model, None)
    del model
    _let_go()
    return found


def _write(
    base: Path,
    config: QuantizationConfig,
    hooks: RunHooks,
    bits: PlannedBits,
    rows: CalibrationRows | None,
    tokenizer: PreTrainedTokenizerBase,
    ctx: RunContext,
) -> None:
    """Quantize, and write what the method's library loads."""
    from .quantization.base import load_quantizable

    ctx.log.info("quantizing with %s", config.method)
    model: Any = load_quantizable(base, config, hooks, ctx, training=False, bits=bits.known, calibration=rows)
    with quiet_transformers():
        hooks.quantizer(str(config.method)).quantizer_save(model=model, config=config, folder=ctx.output)
    tokenizer.save_pretrained(ctx.output)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(ctx.output / "generation_config.json")  # saving it would check it anew
    for path in ctx.output.glob("*.safetensors"):
        shutil.copymode(ctx.output / "config.json", path)  # safetensors writes for the owner alone
    del model
    _let_go()


def _after(
    folder: Path, config: QuantizationConfig, plugin: Quantizer, hooks: RunHooks, facts: ModelFacts, ctx: RunContext
) -> tuple[Reference, int, float]:
    """What the checkpoint says, loaded from its files, its bytes in memory, and the mean bits of what is quantized."""
    from .models.load import load_tokenizer
    from .quantization.base import load_quantizable
    from .quantization.resident import base_bytes

    method = str(config.method)
    saved = saved_quantization(folder)
    if saved is None:
        raise ArtifactError(
            f'what "{method}" wrote is no quantized checkpoint',
            why="its config.json has no quantization_config, so that no library would load it as one",
            fix="it is the plugin's fault: tell its authors, or choose another method",
        )
    options, bits = recognized(saved, QuantizationConfig(method=method), PlanningHooks(hooks), facts)
    own = type(config).parse({**options, "method": method}, source=str(folder / "config.json"))
    model: Module = load_quantizable(folder, own, hooks, ctx, training=False, bits=bits)
    model.requires_grad_(False)
    said = logits_of(model, load_tokenizer(folder), DEFAULT_TEXTS, ctx.progress, "the quantized model")
    quantizer = hooks.quantizer(method)
    return said, base_bytes(model, quantizer), mean_bits(quantizer.quantizer_modules(model=model))


def _compared(
    before: Reference, after: Reference, bits: float, max_kl: float | None, min_top1: float | None
) -> tuple[Parity, ParityTolerance]:
    """Held to what is usual for `bits`, the mean of the quantized weights, or to what the user says."""
    found = parity(before, after)
    # How much is lost is for the user to judge. Twice what is usual lets small models pass, and a damaged one does not.
    usual = quantized_tolerance(bits)
    tolerance = ParityTolerance(mean_kl=2 * usual.mean_kl, top1=usual.top1 / 2).changed(max_kl, min_top1)
    found.check(tolerance, "the quantized model")
    return found, tolerance


def _record(
    done: Quantized,
    tolerance: ParityTolerance,
    model: str,
    source: BaseModelSource,
    choice: Choice,
    rows: CalibrationRows | None,
    ctx: RunContext,
) -> None:
    """parity.json, quantized.json and README.md."""
    from .quantization.calibration import rows_hash

    figures = done.as_data()
    record = {
        "base_model": model if source.kind == "hub" else public_name(str(source.path)),
        "revision": source.revision,
        "format": str((saved_quantization(ctx.output) or {}).get("quant_method")),
        "plain_transformers": done.plain,
        "options": options_for_others(done.options),
        **{key: figures[key] for key in ("method", "bytes_on_disk", "bytes_in_memory", "seconds")},
        "distribution": choice.distribution,
        "version": choice.version,
        "dtype": ctx.plan.dtype,
        "calibration": rows_hash(rows) if rows else None,
        "versions": dict(ctx.plan.versions),
    }
    compared = {
        "compared": "the quantized model, loaded from its files, with the model before",
        "figures": figures["parity"],
        "tolerance": asdict(tolerance),
        "texts_sha256": hashlib.sha256("\0".join(DEFAULT_TEXTS).encode()).hexdigest(),
    }
    write_json(ctx.output / PARITY, compared)
    write_json(ctx.output / RECORD, record)
    card = quantized_card(record, done.parity, from_hub=source.kind == "hub")
    (ctx.output / "README.md").write_text(card, encoding="utf-8")


def _weights(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _let_go() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
