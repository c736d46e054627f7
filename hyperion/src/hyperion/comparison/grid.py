"""The combinations of a grid: each a config, or the reason why there is none. Torch-free."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperion_core.config_file import read_config_file
from hyperion_core.errors import ConfigError, HyperionError, Problem, printable

from ..config import FinetuneConfig
from ..planning import make_plan

Values = Mapping[str, Any]
"""Of one row: the varied keys and what they are in it."""

# A word in place of a mapping is short for this key of it.
_SHORT = {
    "dataset": "dataset",
    "quantization": "method",
    "adapter": "type",
    "objective": "type",
    "lr_scheduler": "type",
}
_NONE = "none"
_QUANTIZERS = ("quantization", "quantization.method")
_LONGEST_NAME = 60


@dataclass(frozen=True)
class GridRow:
    """One combination. `name` is its folder's; `refused` says in a line why it cannot run, "" where it can; `steps` are
    its optimizer steps, where they are known."""

    name: str
    values: Values
    refused: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Grid:
    """`keys` are varied, the first one slowest; `config` is the base config, whole, as plain data."""

    file: Path
    config: Mapping[str, Any]
    vary: Mapping[str, Sequence[Any]]
    rows: tuple[GridRow, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.vary)


def make_grid(file: str | Path, vary: Mapping[str, Sequence[Any]]) -> Grid:
    """Every combination of the varied keys' values, validated as `hyperion validate` does; nothing is run.

    Combinations that mean the same (no quantization, whatever its bits) are one row.

    Raises:
        ConfigError: the base config is refused, has no evaluation data, or is refused in every combination.
    """
    base = FinetuneConfig.from_file(file)
    if empty := [key for key, values in vary.items() if not values]:
        raise _refused(file, empty[0], "there is no value to give it", "name one or more")
    rows: list[GridRow] = []
    seen: list[dict[str, Any]] = []
    errors: list[HyperionError] = []
    combinations = list(itertools.product(*vary.values()))
    for combination in combinations:
        values = dict(zip(vary, combination, strict=True))
        if _is_unquantized(values):  # what else it says of quantization means nothing
            values = {key: None if key.startswith("quantization") else value for key, value in values.items()}
        name = _name(len(rows) + 1, values, len(combinations))
        try:
            config = row_config(file, values)
            if config.as_data() in seen:
                continue
            planned = make_plan(config)
        except HyperionError as error:
            errors.append(error)
            if not any(row.values == values for row in rows):
                rows.append(GridRow(name, values, refused=one_line(error)))
            continue
        seen.append(config.as_data())
        rows.append(GridRow(name, values, steps=planned.plan.steps))
    if all(row.refused for row in rows):
        raise errors[0]
    return Grid(Path(file), base.as_data(), dict(vary), tuple(rows))


def row_config(file: str | Path, values: Values) -> FinetuneConfig:
    """The config of one combination. It is evaluated before its first step too, and nothing of it is published.

    Raises:
        ConfigError: it is refused.
    """
    base, data = FinetuneConfig.from_file(file), copy.deepcopy(read_config_file(file).data)
    if _is_unquantized(values):
        data["quantization"] = None
        values = {key: value for key, value in values.items() if not key.startswith("quantization")}
    for key, value in values.items():
        _put(data, key, value)
    training = data.get("training") or {}
    if training.get("eval_strategy") == "no":
        raise _refused(
            file, "training.eval_strategy", "a row that is not evaluated cannot be compared", "leave eval_strategy out"
        )
    data["training"] = {**training, "eval_on_start": True, "eval_samples": 0, "push_to_hub": False}
    changed = {"quantization", "training", *(key.partition(".")[0] for key in values)}
    config = base.replace(**{key: data.get(key) for key in changed})
    if config.dataset is None or not config.dataset.validation_split:
        raise _refused(
            file,
            "dataset.validation_split",
            "there is no evaluation data, and rows are compared by their perplexity on it",
            "set it to a share of the rows, or to a number of them: dataset.validation_split: 0.1",
        )
    return config


def one_line(error: HyperionError) -> str:
    """What went wrong and why, for a cell of a table."""
    if isinstance(error, ConfigError):
        parts = [_joined(f"{p.path}: {p.what}" if p.path else p.what, p.why) for p in error.problems]
    else:
        parts = [_joined(error.what, error.why)]
    return " ".join(printable("; ".join(parts)).split())


def shown(key: str, value: Any) -> str:
    """A varied value in a table."""
    if value is None:
        return _NONE if key in _QUANTIZERS else "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{inner}: {shown('', each)}" for inner, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; None takes it out."""
    *above, last = key.split(".")
    inner: Any = data
    for part in above:
        below = inner.get(part)
        if isinstance(below, str) and part in _SHORT:
            below = {_SHORT[part]: below}
        elif not isinstance(below, dict):
            below = {}
        inner[part] = below
        inner = below
    if value is None:
        inner.pop(last, None)
    else:
        inner[last] = value


def _is_unquantized(values: Values) -> bool:
    return any(values.get(key, "") in (_NONE, None) for key in _QUANTIZERS)


def _name(number: int, values: Values, most: int) -> str:
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", shown(*each)).strip("-.") for each in values.items())
    name = "-".join(word for word in words if word)[:_LONGEST_NAME].strip("-.")
    return f"{number:0{len(str(most))}d}-{name or 'plain'}"


def _joined(what: str, why: str) -> str:
    return f"{what} ({why})" if why else what


def _refused(file: str | Path, path: str, what: str, fix: str) -> ConfigError:
    return ConfigError([Problem(path, what, "", fix)], source=str(file))
