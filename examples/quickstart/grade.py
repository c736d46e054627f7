"""Grade the answers to the quickstart's support messages. Standard library only.

An answer counts as right only when the whole of it (spaces around it aside) is one JSON object equal to the
expected one: the same keys, the same values, the same types. `true` is not 1, `"48213"` is not 48213, a code fence
or a word before the object makes it wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Shares between 0 and 1 over the graded rows."""

    total: int
    """How many rows were graded."""
    exact: float
    """Answers with every field right: the number that matters."""
    valid_json: float
    """Answers that are one JSON object, right or wrong."""
    fields: dict[str, float]
    """For each field, the answers that have it right (an answer that is not a JSON object has none)."""
    correct: tuple[bool, ...]
    """For each row, in order, whether its answer is right."""

    def __str__(self) -> str:
        fields = ", ".join(f"{name} {share:.1%}" for name, share in self.fields.items())
        return f"{self.exact:.1%} of {self.total} exactly right; valid JSON {self.valid_json:.1%}; {fields}"


def expected(row: Mapping[str, Any]) -> dict[str, Any]:
    """The form that a row asks for: what its last message, the assistant's, holds."""
    form: dict[str, Any] = json.loads(row["messages"][-1]["content"])
    return form


def parse(answer: str) -> dict[str, Any] | None:
    """The JSON object an answer consists of, or None when it is not exactly one object (or repeats a key)."""
    try:
        value = json.loads(answer, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def grade(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Result:
    """Compare each answer with its row's expected form.

    Raises ValueError when there are no rows, or not one answer for each.
    """
    if not rows or len(rows) != len(answers):
        raise ValueError(f"{len(rows)} rows and {len(answers)} answers: there must be one answer a row, and one row.")
    forms = [expected(row) for row in rows]
    found = [parse(answer) for answer in answers]
    names = list(dict.fromkeys(name for form in forms for name in form))
    correct = tuple(_same(form, answer) for form, answer in zip(forms, found, strict=True))
    count = len(forms)
    return Result(
        total=count,
        exact=sum(correct) / count,
        valid_json=sum(answer is not None for answer in found) / count,
        fields={
            name: sum(_has(answer, form, name) for form, answer in zip(forms, found, strict=True)) / count
            for name in names
        },
        correct=correct,
    )


def _has(answer: dict[str, Any] | None, form: dict[str, Any], name: str) -> bool:
    return answer is not None and name in answer and _same(answer[name], form.get(name))


def _same(left: Any, right: Any) -> bool:
    # Compared as text, because Python holds True == 1 and 1 == 1.0, and JSON does not.
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)
