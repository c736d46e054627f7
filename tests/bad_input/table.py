"""docs/reference/errors.md: every case and the error that it really got."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .case import Case

_MOST_LINES = 10
_MOST_LETTERS = 400
_HEAD = """# Errors

What Hyperion says to bad input. Every error names what is wrong, whose it is (a file and line, a plugin and its
distribution, an option), why, and what to do; the command ends with exit code 2 and leaves nothing half-written.

This page is written by `tests/test_bad_input.py`, which runs every row and compares:
`HYPERION_WRITE_DOCS=1 python -m pytest tests/test_bad_input.py` writes it anew.
"""


def errors_page(outcomes: Iterable[tuple[Case, str]]) -> str:
    """The page, from cases and what each printed on stderr."""
    areas: dict[str, list[str]] = {}
    for case, error in outcomes:
        areas.setdefault(case.area, []).append(f"| {_text(case.what)} | {_cell(error)} |")
    parts = [_HEAD]
    for area, rows in areas.items():
        parts.append(
            "\n".join([f"## {area.capitalize()}", "", "| What you did | What you are told |", "| --- | --- |"])
        )
        parts[-1] += "\n" + "\n".join(rows) + "\n"
    return "\n".join(parts)


def _cell(error: str) -> str:
    log, begin, rest = error.partition("error: ")  # what was logged before it is not the error
    lines = [line.strip() for line in (begin + rest or log).splitlines() if line.strip()]
    shown = [_code(line) for line in lines[:_MOST_LINES]]
    return "<br>".join(shown + (["…"] if len(lines) > _MOST_LINES else []))


def _code(line: str) -> str:
    line = line if len(line) <= _MOST_LETTERS else f"{line[:_MOST_LETTERS]}…"
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{padding}{line.replace('|', chr(92) + '|')}{padding}{ticks}"


def _text(what: str) -> str:
    return what.replace("|", "\\|").replace("<", "&lt;")
