"""What a quantizer has made offline, kept: a second run with the same base and options does not quantize again."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from hyperion_core.artifact import sha256
from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import ModelError
from hyperion_core.facts import BitPlan
from hyperion_core.kinds import Quantizer
from hyperion_core.specs import QuantizerSpecs

from ..data.identity import cache_identity


def prepared(
    base: Path, plugin: Quantizer, hooks: QuantizerSpecs, config: QuantizationConfig, bits: BitPlan, ctx: RunContext
) -> Path:
    """What is to be loaded in place of `base`: a folder of the cache, or `base` where nothing is made offline.

    The folder appears in the cache whole: it is written beside its place, then renamed. Of several processes that
    want it one quantizes while the others wait.

    Raises:
        HyperionError: the quantizer refuses; ModelError: the cache cannot be written.
    """
    from filelock import FileLock

    target = ctx.cache / "quantized" / _key(base, plugin, config, bits)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if target.is_dir():
                return target
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
            try:
                made = hooks.quantizer_prepare(
                    source=base, config=config, bits=bits, calibration=None, folder=partial, ctx=ctx
                )
                if made is None or Path(made) != partial:
                    return made or base
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"the quantized model cannot be kept in {target.parent}",
            why=error.strerror or str(error),
            fix="free some space, or set HYPERION_CACHE to a folder that can be written",
        ) from error
    return target


def _key(base: Path, plugin: Quantizer, config: QuantizationConfig, bits: BitPlan) -> str:
    """Of everything that decides what is made: weights and config of the base, options, bits, the plugin's code."""
    digest = hashlib.sha256()
    for path in sorted([*base.glob("*.safetensors"), base / "config.json"]):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    digest.update(f"{config.model_dump_json()}\n{bits}\n{cache_identity(plugin)}".encode())
    return f"{config.method}-{digest.hexdigest()[:16]}".replace(":", "-")
