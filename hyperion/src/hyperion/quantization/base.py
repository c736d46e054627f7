"""From a base model's folder to a model in memory, quantized where the config says so. Functions import torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Quantizer

from ..models.facts import model_facts
from ..models.source import resolve_source
from .existing import recognized, saved_quantization
from .planning import BIT_PLAN, HEAT_MAP, uniform_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .calibration import CalibrationRows


def load_quantizable(
    base: Path,
    config: QuantizationConfig | None,
    hooks: RunHooks,
    ctx: RunContext,
    *,
    training: bool,
    bits: BitPlan | None = None,
    calibration: CalibrationRows | None = None,
    calibration_hash: str | None = None,
    mapped: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `base`, in the plan's dtype and on its device; quantized, unless `config` is None.

    Args:
        hooks: the quantizer that `config.method` names is among its plugins.
        training: an adapter is to be trained on top.
        bits: of each module; None takes those of a checkpoint that is quantized already, then those in `ctx.output`
            (bit_plan.json), and else what `config` says. Bits that are shared out here are left there.
        calibration: what is measured on, where something is.
        mapped: its weights stay in their files, where nothing is quantized.
        calibration_hash: of the rows that were measured on once, in place of them: what was made then is in the cache.

    Raises:
        HyperionError: the folder cannot be loaded, the quantizer refuses it, or what it makes cannot be kept.
    """
    from ..models.lean_loading import own_weights, returning_memory
    from ..models.load import load_model

    if config is None or config.method is None:
        if saved := saved_quantization(base):
            raise CompatibilityError(
                f'{base} is quantized already, by "{saved["quant_method"]}"',
                why="that was not known before it was fetched, so the run was planned for full precision",
                fix="start again: it is in the cache now, and its method is taken from it",
            )
        return load_model(
            base, dtype=ctx.plan.dtype, device=ctx.device, mapped=mapped, trust_remote_code=trust_remote_code
        )
    from .prepared import prepared

    quantizer = hooks.quantizer(config.method)
    plugin: Any = hooks.plugin("quantizer", config.method)
    if bits is None or saved_quantization(base) is not None:
        bits = _bits(base, config, hooks, ctx, calibration, trust_remote_code)
    elif config.bit_plan is not None:
        _keep(bits, base, config, ctx)
    source = base
    if _prepares(plugin):
        source = prepared(base, plugin, quantizer, config, bits, ctx, calibration, calibration_hash)
    load_kwargs = quantizer.quantizer_load_kwargs(source=source, config=config, bits=bits, ctx=ctx)
    with returning_memory():
        model = load_model(
            source,
            dtype=ctx.plan.dtype,
            device=ctx.device,
            trust_remote_code=trust_remote_code,
            load_kwargs=load_kwargs,
        )
        quantized: Any = quantizer.quantizer_after_load(model=model, config=config, bits=bits, training=training)
        del model
        own_weights(quantized)
    return quantized


def _bits(
    base: Path, config: QuantizationConfig, hooks: RunHooks, ctx: RunContext, calibration: CalibrationRows | None,
    trust_remote_code: bool,
) -> BitPlan:  # fmt: skip
    """Of a checkpoint, of the run that goes on, or of the config; bits: auto are measured, and left in the output."""
    if saved := saved_quantization(base):
        return recognized(saved, config, hooks, model_facts(resolve_source(str(base))))[1]
    kept = ctx.output / BIT_PLAN
    if not kept.is_file() and config.bits != "auto":
        return uniform_bits(config)
    from .adaptive import adaptive_bits
    from .bit_plan_file import read_bit_plan
    from .bit_plan_table import bit_plan_lines

    if kept.is_file():
        return read_bit_plan(kept, None)

    plugin: Any = hooks.plugin("quantizer", str(config.method))
    quantizer = hooks.quantizer(str(config.method))
    made = adaptive_bits(base, config, quantizer, plugin, ctx, calibration, trust_remote_code=trust_remote_code)
    shutil.copyfile(made.with_name(HEAT_MAP), ctx.output / HEAT_MAP)
    shutil.copyfile(made, kept)
    found = read_bit_plan(kept, None)
    for line in bit_plan_lines(found, model_facts(resolve_source(str(base)))):
        ctx.log.info("%s", line)
    return found


def _keep(bits: BitPlan, base: Path, config: QuantizationConfig, ctx: RunContext) -> None:
    """The bits of a file that the config names, in the output too: what is trained on them is loaded with them."""
    from .bit_plan_file import write_bit_plan
    from .heat_map import draw_heat_map

    if not (ctx.output / BIT_PLAN).is_file():
        facts = model_facts(resolve_source(str(base)))
        write_bit_plan(ctx.output / BIT_PLAN, bits, facts=facts, method=str(config.method))
        widths = {module.name: bits.of(module.name)[0] for module in facts.linear()}
        draw_heat_map(widths, ctx.output / HEAT_MAP, f"bits by module, {config.method}")


def _prepares(plugin: Quantizer) -> bool:
    return hasattr(plugin, "quantizer_prepare")
