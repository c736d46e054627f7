"""The arguments of `DatasetProcessor`, checked together so that every problem is told at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hyperion_core.errors import DataError, Problem
from hyperion_core.suggest import did_you_mean

from .formats import FIELDS, FORMATS
from .templates import TEMPLATE_FIELDS, template_problem

_TEMPLATES = tuple(f"{field}_template" for field in TEMPLATE_FIELDS)


class DataArgumentsError(DataError):
    """Arguments of a dataset are refused. `problems` holds every one; their paths are argument names."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"the dataset's arguments have {count} problem{'' if count == 1 else 's'}")

    def __str__(self) -> str:
        lines = [line for problem in self.problems for line in str(problem).splitlines()]
        return "\n".join([f"{self.what}:", *(f"  {line}" for line in lines)])


def argument_problems(arguments: Mapping[str, Any], kind: str | None) -> list[Problem]:
    """What is wrong with the arguments, by name; `kind` is the source's kind, None when it was not found."""
    problems = [
        found
        for field in TEMPLATE_FIELDS
        if (text := arguments[f"{field}_template"]) is not None and (found := template_problem(text, field))
    ]
    problems += _format_problems(arguments)
    problems += _column_problems(arguments["columns"])
    problems += _amount_problems(arguments)
    if kind is not None:
        problems += _source_problems(arguments, kind)
    return problems


def effect_problems(arguments: Mapping[str, Any], format: str) -> list[Problem]:
    """Arguments that do nothing for rows of `format`."""
    problems = []
    if arguments["system"] is not None and format != "chat":
        problems.append(
            Problem(
                "system",
                f"has no effect on {format} rows",
                why="only chat rows have a system message",
                fix='set format: "chat", or take `system` out' if format != "text" else "take `system` out",
            )
        )
    if format != "instruction":
        problems += [
            Problem(
                template,
                f"has no effect on {format} rows",
                why="templates are for instruction rows"
                + (", and chat rows go through the model's chat template" if format == "chat" else ""),
                fix=f"take `{template}` out",
            )
            for template in _TEMPLATES
            if arguments[template] is not None
        ]
    return problems


def _format_problems(arguments: Mapping[str, Any]) -> list[Problem]:
    format, system = arguments["format"], arguments["system"]
    problems = []
    if format not in FORMATS:
        problems.append(Problem("format", f"{format!r} is no row format", "a format says what a row becomes",
                                did_you_mean(str(format), FORMATS)))  # fmt: skip
    elif format != "auto":
        problems += effect_problems(arguments, format)
    if system is not None and (not isinstance(system, str) or not system.strip()):
        problems.append(Problem("system", f"must be a text, and not blank: {system!r}",
                                "it is what the model is told first", "take `system` out"))  # fmt: skip
    return problems


def _column_problems(columns: Any) -> list[Problem]:
    if columns is None:
        return []
    if not isinstance(columns, Mapping) or not all(isinstance(c, str) and c for c in columns.values()):
        return [Problem("columns", "must map field names to column names", "it says where each field of a row is found",
                        "for example {instruction: question}")]  # fmt: skip
    problems = [
        Problem(f"columns.{field}", "is no field of a row", "`columns` maps our field names to the data's column names",
                did_you_mean(str(field), FIELDS))
        for field in columns
        if field not in FIELDS
    ]  # fmt: skip
    names = list(columns.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(Problem("columns", f"names the column {', '.join(twice)} for more than one field",
                                "prompt and answer would be the same text", "name another column"))  # fmt: skip
    return problems


def _amount_problems(arguments: Mapping[str, Any]) -> list[Problem]:
    limit, held_out, seed = arguments["sample_limit"], arguments["validation_split"], arguments["seed"]
    problems = []
    limit_is_good = limit is None or (_is_int(limit) and limit >= 1)
    if not limit_is_good:
        problems.append(Problem("sample_limit", f"must be a whole number from 1 on: {limit!r}",
                                "it is how many rows are kept", "leave it out to take all"))  # fmt: skip
    if _is_int(held_out):
        if held_out < 0:
            problems.append(Problem("validation_split", f"cannot be negative: {held_out}",
                                    "it is how many rows are held out", "0 holds out none"))  # fmt: skip
        elif limit is not None and limit_is_good and held_out >= limit:
            problems.append(
                Problem(
                    "validation_split",
                    f"holds out {held_out} rows of the {limit} that `sample_limit` leaves",
                    why="no row would be left to train on",
                    fix="raise `sample_limit`, or lower `validation_split`",
                )
            )
    elif not isinstance(held_out, float) or not 0 <= held_out < 1:
        problems.append(
            Problem(
                "validation_split",
                f"must be a fraction from 0 to below 1, or a whole number of rows: {held_out!r}",
                why="it is the share, or the number, of the rows that are held out",
                fix="for example 0.05",
            )
        )
    if not _is_int(seed) or not 0 <= seed < 2**32:
        problems.append(Problem("seed", f"must be a whole number from 0 to 4294967295: {seed!r}",
                                "NumPy's generator takes 32 bits", "for example 42"))  # fmt: skip
    return problems


def _source_problems(arguments: Mapping[str, Any], kind: str) -> list[Problem]:
    read = {"hub": ("split", "name", "revision"), "saved dataset": ("split",)}.get(kind, ())
    unset = {"split": "train", "name": None, "revision": None}
    return [
        Problem(
            argument,
            f"has no effect on a source of the kind {kind}",
            why=f"only {'a hub dataset' if argument != 'split' else 'a hub or saved dataset'} has one",
            fix=f"take `{argument}` out",
        )
        for argument, default in unset.items()
        if argument not in read and arguments[argument] != default
    ]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
