"""The reference of conformance checks, from the suites."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from .markdown import prose, sentence, table


@dataclass(frozen=True)
class Check:
    """One test of a suite."""

    name: str
    doc: str


def suites() -> dict[str, type]:
    """Every suite that plugin authors inherit, by name; the one that the others inherit comes first."""
    from hyperion_core import testing

    found = {name: getattr(testing, name) for name in testing.__all__ if name.endswith("Conformance")}
    return dict(sorted(found.items(), key=lambda item: (len(item[1].__mro__), item[0])))


def checks(suite: type) -> list[Check]:
    """The checks that a suite itself adds."""
    return [
        Check(name, inspect.getdoc(test) or "")
        for name, test in vars(suite).items()
        if name.startswith("test_") and callable(test)
    ]


def render() -> str:
    parts = []
    for name, suite in suites().items():
        rows = [(check.name.removeprefix("test_").replace("_", " "), sentence(check.doc)) for check in checks(suite)]
        above = next((base.__name__ for base in suite.__mro__[1:] if base.__name__ in suites()), "")
        inherits = f"Has every check of `{above}`, and these:" if above else ""
        parts += [f"## {name}", prose(suite.__doc__), inherits, table(("check", "what it promises"), rows)]
    return "\n\n".join(part for part in parts if part)
