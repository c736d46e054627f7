"""Libraries that tell at length what a machine does not have, held to their errors for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

#: Loggers that speak while transformers and peft import what they find installed.
ON_IMPORT = ("torchao", "torch.utils._pytree", "bitsandbytes")


@contextmanager
def errors_only(*loggers: str) -> Iterator[None]:
    """Inside, these loggers and those below them pass errors alone; afterwards all are as before."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
