"""A folder that appears whole or not at all: what a command makes is written beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hyperion_core.errors import ArtifactError, HyperionError

from .disk import refusal


@contextmanager
def new_folder(destination: Path, what: str) -> Iterator[Path]:
    """Inside, an empty folder to write into, on the same disk; at the end it becomes `destination`.

    After any error nothing of it is left, and neither are folders above it that were made for it. Light: entered
    before anything heavy is imported, so that a place that cannot be had is refused at once.

    Args:
        what: for errors: "the merged model".

    Raises:
        ArtifactError: the place is taken or cannot be written, or the disk refused later.
    """
    try:
        destination = destination.expanduser().absolute()
        _check_free(destination)
        missing = [path for path in destination.parents if not path.exists()]
        partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder; ValueError: a NUL in a path
        raise _unwritable(what, destination, getattr(error, "strerror", None) or str(error)) from error
    try:
        yield partial
        with suppress(FileNotFoundError):
            destination.rmdir()  # an empty one, which Windows would not replace
        partial.rename(destination)
        missing = []
    except HyperionError:
        raise
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise _unwritable(what, destination, reason) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for path in missing:
                path.rmdir()


def _check_free(destination: Path) -> None:
    if destination.is_dir():
        if not any(destination.iterdir()):
            return
        how = "not empty"
    elif destination.exists() or destination.is_symlink():
        how = "a file" if destination.is_file() else "a link to nowhere"
    else:
        return
    raise ArtifactError(
        f"the output folder {destination} is {how}",
        why="what is there is never overwritten",
        fix="name a folder that does not exist yet",
    )


def _unwritable(what: str, destination: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{what} cannot be written to {destination}",
        why=f"{reason}; nothing was left behind",
        fix="make room, or choose an output folder on another disk, one that you may write to",
    )
