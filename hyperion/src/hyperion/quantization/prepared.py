"""What a quantizer has made offline, kept: a second run with the same base and options does not quantize again."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hyperion_core.artifact import sha256
from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import ModelError
from hyperion_core.facts import BitPlan
from hyperion_core.kinds import Quantizer
from hyperion_core.specs import QuantizerSpecs

from ..data.identity import cache_identity
from ..disk import refusal
from .calibration import rows_hash

if TYPE_CHECKING:
    from .calibration import CalibrationRows


def prepared(
    base: Path,
    plugin: Quantizer,
    hooks: QuantizerSpecs,
    config: QuantizationConfig,
    bits: BitPlan,
    ctx: RunContext,
    calibration: CalibrationRows | None = None,
    calibration_hash: str | None = None,
) -> Path:
    """What is to be loaded in place of `base`: a folder of the cache, or `base` where nothing is made offline.

    Args:
        calibration: what the quantizer measures on, if it does; or
        calibration_hash: of these rows, where they are not at hand: then the folder must be in the cache.

    The folder appears in the cache whole: it is written beside its place, then renamed. Of several processes that
    want it one quantizes while the others wait.

    Raises:
        HyperionError: the quantizer refuses; ModelError: the cache cannot be written.
    """
    from filelock import FileLock

    if calibration is not None:
        calibration_hash = rows_hash(calibration)
    target = ctx.cache / "quantized" / _key(base, plugin, config, bits, calibration_hash)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if target.is_dir():
                return target
            if calibration is None and calibration_hash is not None:
                raise _gone(base, config, target)
            partial = empty_partial(target)
            try:
                made = hooks.quantizer_prepare(
                    source=base, config=config, bits=bits, calibration=calibration, folder=partial, ctx=ctx
                )
                if made is None or not Path(made).resolve().is_relative_to(partial.resolve()):
                    return made or base
                Path(made).rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        # a library may have wrapped what the disk said, or the plugin what the library said
        reason = refusal(error) or (isinstance(error.__cause__, Exception) and refusal(error.__cause__))
        if not reason:
            raise
        raise ModelError(
            f"the quantized model cannot be kept in {target.parent}",
            why=reason,
            fix="free some space, or set HYPERION_CACHE to a folder that can be written",
        ) from error
    return target


def empty_partial(target: Path) -> Path:
    """A new folder beside `target`, to be written and then renamed to it. Under the lock of `target`: what lies there
    is of a process that was killed."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def _gone(base: Path, config: QuantizationConfig, target: Path) -> ModelError:
    return ModelError(
        f"the quantized base of this adapter is no longer in the cache: {target}",
        why=f"{config.method} made it of {base} and of data that the artifact does not hold",
        fix="run the training again, which makes the same one; to have it in a place of your own, make it with "
        "`hyperion quantize`, and name that as the base",
    )


def _key(base: Path, plugin: Quantizer, config: QuantizationConfig, bits: BitPlan, calibration_hash: str | None) -> str:
    """Of everything that decides what is made: weights, configs and code of the base, options, bits, what was measured
    on, the plugin's code."""
    digest = hashlib.sha256()
    files = [*base.glob("*.safetensors"), *base.glob("*.py"), *base.glob("generation_config.json")]
    for path in sorted([*files, base / "config.json"]):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    options = config.model_dump_json(
        exclude={"bits", "group_size", "target_bits", "budget_mb", "bit_plan", "calibration"}
    )
    digest.update(f"{options}\n{bits}\n{calibration_hash}\n{cache_identity(plugin)}".encode())
    return f"{config.method}-{digest.hexdigest()[:16]}".replace(":", "-")
