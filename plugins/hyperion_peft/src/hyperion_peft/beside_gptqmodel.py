"""peft beside gptqmodel, which it imports where it is installed as soon as a first layer is wrapped, whatever the base
is: that prints a banner, takes seconds, sets environment variables, and is refused where optimum is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ASKS = "is_gptqmodel_available"


@contextmanager
def without_gptqmodel() -> Iterator[None]:
    """Around peft's wrapping of layers: gptqmodel counts as absent, unless it is imported. No layer can be one of its
    own before that."""
    if "gptqmodel" in sys.modules:
        yield
        return
    # The function itself stays: a module of peft that is first imported in here takes it along for good.
    peft = [module for name, module in list(sys.modules.items()) if name.startswith(("peft.tuners.", "peft.utils."))]
    asking = [module for module in peft if _ASKS in vars(module)]
    before = [getattr(module, _ASKS) for module in asking]
    for module in asking:
        setattr(module, _ASKS, _no)
    try:
        yield
    finally:
        for module, answer in zip(asking, before, strict=True):
            setattr(module, _ASKS, answer)


def _no() -> bool:
    return False
