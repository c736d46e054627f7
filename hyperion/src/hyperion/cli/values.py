"""`key=value` on a command line: the value is read as it would be in a config."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from hyperion_core.config_file import read_config_file
from hyperion_core.errors import ConfigError

from .usage import UsageError

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


def key_and_value(option: str, text: str) -> tuple[str, str]:
    """The two sides of "key=value".

    Raises:
        UsageError: it has no such form.
    """
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key.strip()) or not value.strip():
        raise UsageError(
            f"{option} {text!r} is not of the form key=value",
            why="the key is dotted as in a config: training.learning_rate",
            fix=f"{option} quantization.bits=4" if option == "--vary" else f"{option} group_size=64",
        )
    return key.strip(), value.strip()


def parsed(option: str, text: str, *, several: bool = False) -> Any:
    """A value as YAML; with `several`, the list of values that commas part.

    Raises:
        UsageError: it is not YAML.
    """
    shown = f"[{text}]" if several and not text.startswith("[") else text
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "value.yaml")
        file.write_text(f"value: {shown}\n", encoding="utf-8")
        try:
            value = read_config_file(file).data["value"]
        except (ConfigError, KeyError) as error:
            reasons = getattr(error, "problems", ())
            raise UsageError(
                f"{option}: the value {text!r} cannot be read",
                why="; ".join(f"{problem.what}: {problem.why}" for problem in reasons) or "it is no YAML",
                fix="write it as it would stand in a config; quote what has a comma or a colon in it",
            ) from error
    if several and not value:
        raise UsageError(f"{option}: {text!r} names no value", why="there is nothing to vary", fix="name two or more")
    return value


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings in mappings.

    Raises:
        UsageError: one key is a value and holds others.
    """
    data: dict[str, Any] = {}
    for key, value in changes.items():
        *above, last = key.split(".")
        inner = data
        for part in above:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--set {key}: {part} has a value of its own", why="a key holds a value or other keys",
                                 fix="leave one of the two out")  # fmt: skip
        if isinstance(inner.get(last), dict) and isinstance(value, dict):
            inner[last] |= value
        else:
            inner[last] = value
    return data
