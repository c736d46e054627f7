"""The checks of the data audit, from the audit."""

from __future__ import annotations

from hyperion.data.audit import CHECKS

from .markdown import code, sentence, table


def checks() -> dict[str, str]:
    """What each check looks at, by its name."""
    return dict(CHECKS)


def render() -> str:
    return table(("check", "what has to be so"), [(code(name), sentence(what)) for name, what in checks().items()])
