"""Base models that are quantized already: what their config.json says, and which plugin loads them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import CompatibilityError, ModelError, PluginError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.kinds import Plugin, Quantizer
from hyperion_core.registry import registry
from hyperion_core.specs import QuantizerSpecs

from ..models.facts import read_config
from .choice import quantizer_names


class Drivers(Protocol):
    """`RunHooks`, or `PlanningHooks` around them."""

    def quantizer(self, name: str) -> QuantizerSpecs: ...
    def plugin(self, kind: str, name: str) -> Plugin: ...


def saved_quantization(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a model folder's config.json; None of an unquantized model.

    Raises:
        ModelError: config.json cannot be read, or does not name the method.
    """
    saved = read_config(folder).get("quantization_config")
    if not saved:
        return None
    if not isinstance(saved, Mapping) or not isinstance(saved.get("quant_method"), str):
        raise ModelError(
            f"{folder} is quantized, and its config.json does not say how",
            why='"quantization_config" names no "quant_method"',
            fix="start from the unquantized model, or quantize it again",
        )
    return dict(saved)


def reader_of(quant_method: str) -> str | None:
    """The installed quantizer that loads such checkpoints; the first by name of several."""
    for name in quantizer_names():
        try:
            plugin = registry().load("quantizer", name)
        except PluginError:  # told where it is chosen
            continue
        if issubclass(plugin, Quantizer) and quant_method in plugin.provides.reads:
            return name
    return None


def unknown_format(folder: Path) -> str:
    """The quantized checkpoint's format, where plain transformers has no loader for it; else "".

    Such a checkpoint transformers loads with random numbers in place of what is packed, and only warns.
    """
    from transformers.utils.quantization_config import QuantizationMethod

    saved = saved_quantization(folder)
    if saved is None or saved["quant_method"] in {known.value for known in QuantizationMethod}:
        return ""
    return str(saved["quant_method"])


def recognized(
    saved: Mapping[str, Any], config: QuantizationConfig, hooks: Drivers, facts: ModelFacts
) -> tuple[dict[str, Any], BitPlan]:
    """Options and bits of a quantized checkpoint, as the plugin that `config` names reads them.

    Raises:
        CompatibilityError: it is another method's checkpoint.
    """
    method = str(config.method)
    plugin: Any = hooks.plugin("quantizer", method)
    was = str(saved["quant_method"])
    if was not in plugin.provides.reads:
        reader = reader_of(was)
        raise CompatibilityError(
            f'{facts.source} is quantized already, by "{was}", and {method} cannot quantize it again',
            why="what rounding took away does not come back: a second rounding adds its error to the first",
            fix="start from the unquantized model"
            + (f", or leave out quantization: it is loaded as it is, by {reader}" if reader else ""),
        )
    options, bits = hooks.quantizer(method).quantizer_recognize(saved=saved, model=facts)
    return dict(options), bits


def refuse_other(options: Mapping[str, Any], bits: BitPlan, config: QuantizationConfig, name: str) -> None:
    """What the user's `config` says of a quantized checkpoint must be so.

    Args:
        options, bits: as `recognized` gives them.

    Raises:
        CompatibilityError: it asks for something else.
    """
    asked = config.given()
    other = [
        f"{key}: {options[key]!r} in the checkpoint, {asked[key]!r} in the config"
        for key in sorted(asked.keys() & options.keys())
        if asked[key] is not None and asked[key] != options[key]
    ]
    widths = sorted({width for width, _ in bits.overrides.values()} - {16}) if bits.overrides else [bits.bits]
    if "bits" in asked and "bits" not in options and widths != [asked["bits"]]:
        held = " and ".join(map(str, widths))
        other.append(f"bits: {held}, by module, in the checkpoint, {asked['bits']!r} in the config")
    unheard = [key for key in ("target_bits", "budget_mb", "bit_plan") if asked.get(key) is not None]
    if other or unheard:
        raise CompatibilityError(
            f"{name} is quantized already, otherwise than the config asks for",
            why="; ".join([*other, *(f"{key} shares out bits that are fixed" for key in unheard)]),
            fix="leave these options out, or start from the unquantized model",
        )
