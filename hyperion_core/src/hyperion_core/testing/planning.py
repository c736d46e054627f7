"""What a hook that is called while planning may not do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..examination import HEAVY
from .side_effects import SideEffects, side_effects


@contextmanager
def planning(hook: str) -> Iterator[SideEffects]:
    """Inside, torch and its like cannot be imported, and who reaches out is caught.

    Raises:
        AssertionError: something did so.
    """
    # Submodules too: one that is loaded already would be found without its package.
    loaded = [name for name in sys.modules if name.partition(".")[0] in HEAVY]
    hidden = {name: sys.modules.get(name) for name in (*HEAVY, *loaded)}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's own way to refuse an import
    refused = None
    seen = SideEffects()
    try:
        with side_effects() as seen:
            yield seen
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in HEAVY:
            raise
        refused = error
    finally:
        for name, module in hidden.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        assert not seen.outside, f"{hook} reaches out of this process: {seen.outside}"
    assert refused is None, f"{hook} imports {refused and refused.name}: planning is torch-free"
