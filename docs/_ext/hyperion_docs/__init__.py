"""Reference pages written from the code when the site is built, so that they cannot drift from it.

A page holds a line `<!-- generated: NAME -->`, and the generator of that name replaces it. The generators import
neither Sphinx nor torch; `tests/test_docs_reference.py` holds them against the code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import audit, commands, configuration, conformance, hooks, names

GENERATORS = {
    "audit": audit.render,
    "commands": commands.render,
    "configuration": configuration.render,
    "conformance": conformance.render,
    "hooks": hooks.render,
    "names": names.render,
}
MARK = re.compile(r"^<!-- generated: (\S+) -->$", re.MULTILINE)


def filled(text: str) -> str:
    """A page with its generated parts in it.

    Raises:
        KeyError: there is no such generator.
    """
    return MARK.sub(lambda mark: GENERATORS[mark[1]](), text)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, filled(source[0])))
    app.connect("env-get-outdated", lambda app, env, *changes: _generated(env))  # the code may have changed
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _generated(env: Any) -> list[str]:
    """Pages with generated parts."""
    return [name for name in env.found_docs if MARK.search(Path(env.doc2path(name)).read_text(encoding="utf-8"))]
