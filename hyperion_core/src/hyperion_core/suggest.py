"""'Did you mean …?': the closest of the names that would have been right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like `name`, if one does."""
    options = list(allowed)
    found = difflib.get_close_matches(name.lower(), [o.lower() for o in options], n=1, cutoff=0.6)
    return next((o for o in options if o.lower() == found[0]), None) if found else None


def did_you_mean(name: str, allowed: Iterable[str], *, most: int = 12) -> str:
    """A fix line: the closest name, or all names when none is close, or "" when there are none."""
    options = sorted(set(allowed))
    best = closest(name, options)
    if best:
        return f'did you mean "{best}"?'
    if not options:
        return ""
    return "allowed: " + ", ".join(options[:most]) + (f" and {len(options) - most} more" if len(options) > most else "")
