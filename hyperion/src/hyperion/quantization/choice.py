"""Which quantizer does what a config asks for, where the config names none. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyperion_core.config import problems_of, raise_problems
from hyperion_core.errors import HyperionError, PluginError, Problem
from hyperion_core.facts import Provides
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import registry
from pydantic import ValidationError


def choose_method(data: Mapping[str, Any]) -> tuple[str, str]:
    """The installed quantizer that takes these options, and why it is this one.

    Of several, one that needs no calibration data comes first (unless the options name such data), then the one that is
    made for the fewest widths, then the first by name.

    Raises:
        pydantic.ValidationError: none is installed, or none takes them; says what each has against them.
    """
    names = quantizer_names()
    if not names:
        what, why = (
            "quantization needs a quantizer, and none is installed",
            "how weights are quantized is a plugin's matter",
        )
        raise_problems([Problem("", what, why, 'install one, for example: python -m pip install "hyperion-ft[bnb]"')])
    if len(names) == 1:
        return names[0], "it is the only one installed"
    refusals, fitting = {}, {}
    for name in names:
        try:
            plugin = registry().load("quantizer", name)
        except PluginError as error:
            refusals[name] = error.what
            continue
        assert issubclass(plugin, Quantizer)
        if found := _against(plugin, {**data, "method": name}):
            refusals[name] = found
        else:
            fitting[name] = plugin.provides
    if not fitting:
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        fix = "change the options, or say which method: " + ", ".join(names)
        raise_problems([Problem("", "no installed quantizer does what these options ask for", why, fix)])
    calibrates = data.get("calibration") is not None
    best = min(fitting, key=lambda name: (fitting[name].calibration != calibrates, len(fitting[name].bits), name))
    return best, _reason(best, fitting, refusals)


def _against(plugin: type[Quantizer], data: dict[str, Any]) -> str:
    """What a quantizer has against these options; "" for nothing."""
    try:
        plugin.config_class.model_validate(data)
    except ValidationError as error:
        return "; ".join(problem.what for problem in problems_of(error))
    except HyperionError as error:
        return error.what
    except Exception as error:  # a plugin's own fault is told where it is chosen by name
        return f"it failed: {type(error).__name__}: {error}"
    provides, bits = plugin.provides, data.get("bits") or 4
    if not provides.trainable:
        return "nothing can be trained on top of it"
    if bits == "auto" or data.get("bit_plan") is not None:
        return "" if provides.per_module else "all its modules have the same bits"
    return "" if bits in provides.bits else f"it holds weights in {_listed(provides)} bits"


def _reason(best: str, fitting: Mapping[str, Provides], refusals: Mapping[str, str]) -> str:
    others = [name for name in fitting if name != best]
    if not others:
        return "; ".join(f"not {name}: {reason}" for name, reason in refusals.items())
    also = f"{' and '.join(others)} could do this too"
    if any(fitting[name].calibration != fitting[best].calibration for name in others):
        kind = "measures on data" if fitting[best].calibration else "needs no calibration data"
        if all(fitting[name].calibration != fitting[best].calibration for name in others):
            return f"it {kind}; {also}"
    return f"it is made for {_listed(fitting[best])} bits; {also}"


def _listed(provides: Provides) -> str:
    return ", ".join(map(str, sorted(provides.bits - {16})))


def quantizer_names() -> list[str]:
    """What a person would write: the distribution only where two have a quantizer of the same name."""
    entries = registry().entries("quantizer")
    short = [entry.name for entry in entries]
    return sorted({entry.name if short.count(entry.name) == 1 else entry.qualified for entry in entries})
