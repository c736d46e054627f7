"""Commands that write a folder whole or not at all, when they are stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def nothing_written() -> Iterator[None]:
    """Around such a command's work: Ctrl-C and SIGTERM take away what is half-written, and say so."""
    from hyperion.engine.interruption import terminate

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stopped:
        typer.echo("\ninterrupted; nothing was written", err=True)
        raise typer.Exit(128 + getattr(stopped, "signum", signal.SIGINT)) from None
