"""Keeps transformers' loading reports and bars off the terminal; what matters in them is raised as an error instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hyperion_core.quiet import ON_IMPORT, errors_only


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers, and what it imports to load a model, log errors only, and it draws no progress bar.
    Afterwards all are as before."""
    with errors_only(*ON_IMPORT):
        from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with errors_only(*ON_IMPORT):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
