"""A config is copied into a run's plan and model card: what must stay a secret has no place in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hyperion_core.errors import Problem
from hyperion_core.secrets import redacted


def secret_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Every value of a config, given as plain data, that holds a secret of the environment or looks like one."""
    return [
        Problem(
            path,
            f"holds a secret: {redacted(text)}",
            "a run copies its config into plan.json and the model card, which are meant to be shared",
            "take it out; libraries read their tokens from the environment, or from `hf auth login`",
        )
        for path, text in _texts(config)
        if redacted(text) != text
    ]


def _texts(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _texts(each, f"{path}.{number}")
