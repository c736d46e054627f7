"""`bits: auto`: measure what each module's bits cost, share them out under the budget, keep the plan. Imports torch in
functions."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hyperion_core.artifact import sha256, write_json
from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, DataError, ModelError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.kinds import Quantizer
from hyperion_core.specs import QuantizerSpecs

from ..data.identity import cache_identity
from ..models.facts import model_facts
from ..models.source import resolve_source
from . import allocation, second_moments, sensitivity
from .allocation import (
    UNQUANTIZED,
    Sizes,
    allocate,
    budget_of,
    check_budget,
    module_sizes,
    shared_group,
    unquantizable_bytes,
)
from .bit_plan_file import write_bit_plan
from .calibration import rows_hash
from .heat_map import draw_heat_map
from .planning import BIT_PLAN, CANDIDATES, HEAT_MAP
from .prepared import empty_partial
from .sensitivity import Sensitivity, measure_sensitivity

if TYPE_CHECKING:
    from torch import Tensor

    from .calibration import CalibrationRows


def adaptive_bits(
    base: Path,
    config: QuantizationConfig,
    quantizer: QuantizerSpecs,
    plugin: Quantizer,
    ctx: RunContext,
    rows: Iterable[Mapping[str, Tensor]] | None,
    trust_remote_code: bool = False,
) -> Path:
    """Bits by module within `config`'s budget: the path of a bit plan in the cache, its heat map beside it.

    The same weights, options, rows and plugin are not measured again; another budget for them is shared out at once.

    Args:
        base: folder of the unquantized model.
        rows: `input_ids` and `attention_mask`, int64 (B, T): what is measured on.

    Raises:
        DataError: there are no rows.
        CompatibilityError: the quantizer does not round single weights, or the budget is below its least.
        ModelError: the model cannot be loaded or measured, or the cache cannot be written.
    """
    facts, dtype = model_facts(resolve_source(str(base))), ctx.plan.dtype
    group = shared_group(config, facts)
    config = config.model_copy(update={"group_size": group or None})
    sizes = module_sizes(quantizer, config, facts, CANDIDATES & plugin.provides.bits, group, dtype)
    rest = unquantizable_bytes(quantizer, config, facts, sizes, dtype)
    budget = budget_of(config, sizes, rest)
    if not hasattr(plugin, "quantizer_fake_quantize"):
        raise CompatibilityError(
            f'"{config.method}" cannot say what it would make of a weight, so that its bits cannot be weighed',
            why="it has no hook quantizer_fake_quantize",
            fix="give a number of bits, or choose another method",
        )
    check_budget(sizes, budget)
    given = [dict(row) for row in rows or ()]
    if not given:
        raise DataError(
            "bits: auto has no data to measure on",
            why="what a module's bits cost shows in the loss on real text",
            fix="name some: quantization.calibration.dataset; or give a number of bits",
        )
    measured = _hash(base, config, plugin, sizes, rows_hash(given), ctx)
    key = hashlib.sha256(f"{measured}\n{budget}\n{_code(allocation)}".encode()).hexdigest()[:16]
    folder = ctx.cache / "bit-plans"
    target = folder / f"{config.method}-{key}".replace(":", "-")
    try:
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{measured}.lock"):
            if not target.is_dir():
                found = _sensitivity(
                    folder / f"{measured}.json", base, config, quantizer, plugin, sizes, given, ctx, trust_remote_code
                )
                _write(target, allocate(found, sizes, budget), config, facts, found, sizes, budget, rest)
    except OSError as error:
        raise ModelError(
            f"the bit plan cannot be kept in {folder}",
            why=error.strerror or str(error),
            fix="free some space, or set HYPERION_CACHE to a folder that can be written",
        ) from error
    return target / BIT_PLAN


def _sensitivity(
    kept: Path, base: Path, config: QuantizationConfig, quantizer: QuantizerSpecs, plugin: Quantizer, sizes: Sizes,
    rows: CalibrationRows, ctx: RunContext, trust_remote_code: bool,
) -> Sensitivity:  # fmt: skip
    """From the cache, or measured and put there."""
    from ..models.load import load_model

    # One that cannot be read is measured anew.
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return Sensitivity.from_json(json.loads(kept.read_text(encoding="utf-8")))
    model = load_model(base, dtype=ctx.plan.dtype, device=ctx.device, trust_remote_code=trust_remote_code)
    group = config.group_size or 0
    looks = plugin.provides.calibration
    found = measure_sensitivity(
        model, quantizer, config, sizes, group, rows, ctx.progress, looks_at_data=looks, seed=ctx.seed
    )
    write_json(kept, found.to_json())
    return Sensitivity.from_json(found.to_json())  # as a run that finds it in the cache reads it


def _write(
    target: Path, bits: Mapping[str, int], config: QuantizationConfig, facts: ModelFacts, found: Sensitivity,
    sizes: Sizes, budget: int, rest: int,
) -> None:  # fmt: skip
    """The folder appears in the cache whole: it is written beside its place, then renamed."""
    group = config.group_size or 0
    pairs = {name: (width, group if width != UNQUANTIZED else 0) for name, width in bits.items()}
    taken = sum(sizes[name][width] for name, width in bits.items())
    partial = empty_partial(target)
    try:
        write_bit_plan(
            partial / BIT_PLAN,
            BitPlan(UNQUANTIZED, 0, pairs),
            facts=facts,
            method=str(config.method),
            sensitivity=found,
            nbytes={"linear": taken, "linear_budget": budget, "model": taken + rest},
        )
        within = f"{config.target_bits:g} bits" if config.target_bits else f"{config.budget_mb:g} MB"
        draw_heat_map(bits, partial / HEAT_MAP, f"bits by module, {config.method}, within {within}")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hash(
    base: Path, config: QuantizationConfig, plugin: Quantizer, sizes: Sizes, calibration_hash: str, ctx: RunContext
) -> str:
    """Of everything that decides what is measured."""
    digest = hashlib.sha256()
    for path in sorted([*base.glob("*.safetensors"), base / "config.json"]):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    options = config.model_dump_json(exclude={"bits", "target_bits", "budget_mb", "bit_plan", "calibration"})
    choices = {name: sorted(of) for name, of in sizes.items()}
    run = f"{ctx.plan.dtype} {ctx.device} {ctx.seed}"
    code = f"{cache_identity(plugin)} {_code(sensitivity)} {_code(second_moments)}"
    digest.update(f"{options}\n{choices}\n{calibration_hash}\n{run}\n{code}".encode())
    return digest.hexdigest()[:16]


def _code(module: object) -> str:
    """Of one file of ours."""
    return sha256(Path(str(getattr(module, "__file__", ""))))
