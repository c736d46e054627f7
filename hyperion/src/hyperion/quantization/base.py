"""From a base model's folder to a model in memory, quantized where the config says so. Functions import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.facts import BitPlan
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def uniform_bits(config: QuantizationConfig) -> BitPlan:
    """The same bits everywhere; group size 0 is the method's own."""
    return BitPlan(config.bits, config.group_size or 0)


def load_quantizable(
    base: Path,
    config: QuantizationConfig | None,
    hooks: RunHooks,
    ctx: RunContext,
    *,
    training: bool,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `base`, in the plan's dtype and on its device; quantized, unless `config` is None.

    Args:
        hooks: the quantizer that `config.method` names is among its plugins.
        training: an adapter is to be trained on top.

    Raises:
        HyperionError: the folder cannot be loaded, the quantizer refuses it, or what it makes cannot be kept.
    """
    from ..models.load import load_model

    if config is None or config.method is None:
        return load_model(base, dtype=ctx.plan.dtype, device=ctx.device, trust_remote_code=trust_remote_code)
    from .prepared import prepared

    bits = uniform_bits(config)
    quantizer = hooks.quantizer(config.method)
    plugin: Any = hooks.plugin("quantizer", config.method)
    source = prepared(base, plugin, quantizer, config, bits, ctx) if _prepares(plugin) else base
    model = load_model(
        source,
        dtype=ctx.plan.dtype,
        device=ctx.device,
        trust_remote_code=trust_remote_code,
        load_kwargs=quantizer.quantizer_load_kwargs(source=source, config=config, bits=bits, ctx=ctx),
    )
    quantized: Any = quantizer.quantizer_after_load(model=model, config=config, bits=bits, training=training)
    return quantized


def _prepares(plugin: Quantizer) -> bool:
    return hasattr(plugin, "quantizer_prepare")
