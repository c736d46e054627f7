"""A model's bits by module as a JSON file: written after they were shared out, read by any run. Torch-free.

    {"version": 1, "model_type": "llama", "method": "gptq", "group_size": 64,
     "modules": {"model.layers.0.mlp.down_proj": 4, ...}, ...}

What else is in it says where the bits come from: the budget, and the loss that each width of each module was measured
to cost. Nothing of the data that was measured on is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hyperion_core.errors import CompatibilityError, ConfigError, Problem
from hyperion_core.facts import BitPlan, ModelFacts

from .sensitivity import Sensitivity

VERSION = 1
_UNQUANTIZED = 16
_MOST_BYTES = 50_000_000
_MOST_NAMED = 3


def write_bit_plan(
    path: Path,
    plan: BitPlan,
    *,
    facts: ModelFacts,
    method: str,
    sensitivity: Sensitivity | None = None,
    nbytes: Mapping[str, int] | None = None,
) -> None:
    """Write the bits of `facts`' linear modules: the same bytes for the same arguments.

    Args:
        method: the quantizer that they were shared out for; another one that has bits by module takes them too.
        nbytes: what they take and were allowed to take, as "linear" and "budget".

    Raises:
        ValueError: the quantized modules have different group sizes, which the file has no room for.
    """
    bits = {module.name: plan.of(module.name)[0] for module in facts.linear()}
    groups = {plan.of(name)[1] for name, width in bits.items() if width != _UNQUANTIZED}
    if len(groups) > 1:
        raise ValueError(f"a bit plan has one group size, not {sorted(groups)}")
    content: dict[str, Any] = {
        "version": VERSION,
        "model_type": facts.model_type,
        "method": method,
        "group_size": groups.pop() if groups else 0,
        "modules": {name: bits[name] for name in sorted(bits, key=_natural)},
    }
    if nbytes is not None:
        content["bytes"] = dict(sorted(nbytes.items()))
    if sensitivity is not None:
        content["sensitivity"] = sensitivity.to_json()
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def read_bit_plan(path: Path, facts: ModelFacts | None) -> BitPlan:
    """The bits in a file, whose modules must be those of `facts`; None looks at the file alone.

    Raises:
        ConfigError: it cannot be read, or is no bit plan.
        CompatibilityError: it is of a model of another architecture, or of other modules.
    """
    return read_with_method(path, facts)[0]


def read_with_method(path: Path, facts: ModelFacts | None) -> tuple[BitPlan, str]:
    """As `read_bit_plan`, and the method that the bits were shared out for, "" where the file does not say."""
    content = _content(path)
    bits = {name: content["modules"][name] for name in sorted(content["modules"], key=_natural)}
    if facts is not None:
        _check_model(path, content["model_type"], bits, facts)
    group = content["group_size"]
    pairs = {name: (width, 0 if width == _UNQUANTIZED else group) for name, width in bits.items()}
    return BitPlan(_UNQUANTIZED, 0, pairs), str(content.get("method") or "")


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _refused(path, f"it has more than {_MOST_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "name a file that `bits: auto` has written") from error
    except RecursionError as error:
        raise _refused(path, "its JSON is nested too deeply") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise _refused(path, f"it is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("modules"), dict):
        raise _refused(path, 'it has no "modules", which give each module its bits')
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        newer = f"it is of version {content.get('version')!r}, and this Hyperion reads version {VERSION}"
        raise _refused(path, newer, "make it again with this version, or install the one that wrote it")
    if not isinstance(content.get("model_type"), str):
        raise _refused(path, '"model_type" is not a text')
    group: Any = content.get("group_size")
    if not _is_int(group) or group < 0:
        raise _refused(path, f'"group_size" is {group!r}: a number is wanted, 0 for the method\'s own')
    if wrong := [f"{name}: {width!r}" for name, width in content["modules"].items() if not _is_width(width)]:
        raise _refused(path, f"bits are whole numbers from 1 to {_UNQUANTIZED}; {_some(wrong)}")
    return content


def _check_model(path: Path, model_type: str, bits: Mapping[str, int], facts: ModelFacts) -> None:
    names = {module.name for module in facts.linear()}
    missing, unknown = sorted(names - bits.keys(), key=_natural), sorted(bits.keys() - names, key=_natural)
    whys = []
    if model_type and facts.model_type and model_type != facts.model_type:
        whys.append(f'it is of a "{model_type}" model, and this one is "{facts.model_type}"')
    if unknown:
        whys.append(f"the model has no {_some(unknown)}")
    if missing:
        whys.append(f"the plan says nothing of {_some(missing)}")
    if whys:
        raise CompatibilityError(
            f"the bit plan {path} is not of the model {facts.source!r}",
            why="; ".join(whys),
            fix="use the plan that was made for this model, or have a new one made: bits: auto",
        )


def _refused(path: Path, why: str, fix: str = "") -> ConfigError:
    fix = fix or "copy the file again, or have it made anew: bits: auto"
    return ConfigError([Problem("bit_plan", f"{path} is not a bit plan that can be used", why, fix)])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_width(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= _UNQUANTIZED


def _some(items: Iterable[str]) -> str:
    shown = list(items)
    more = len(shown) - _MOST_NAMED
    return ", ".join(shown[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
