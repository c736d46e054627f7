"""A disk that refuses: full, gone, read-only, over a quota. Each library that writes says it in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperion_core.errors import HyperionError, TrainingError

# torch and safetensors raise what is no OSError, with these words in it
_SAID = ("no space left", "os error", "i/o error", "file write failed", "streamwriter failed", "unexpected pos",
         "file too large", "quota exceeded")  # fmt: skip


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Inside, files of a run are written below `folder`, the run's.

    Raises:
        TrainingError: the disk refused; says how the run can go on.
    """
    try:
        yield
    except HyperionError:
        raise
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise TrainingError(
            f"{what} cannot be written",
            why=f"the output folder {folder} is gone" if not folder.is_dir() else reason,
            fix=_fix(folder),
        ) from error


def refusal(error: Exception) -> str | None:
    """Why the disk refused, in a few words; None where the error tells of something else."""
    if not isinstance(error, OSError) and not any(said in str(error).lower() for said in _SAID):
        return None
    return (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]


def _fix(folder: Path) -> str:
    from .engine.checkpoints import checkpoints

    if not folder.is_dir():
        return "put it back and go on with --resume, or begin again in another output_dir"
    present = checkpoints(folder)
    if present:
        return f"make room, then go on with --resume: {present[-1].name} is complete"
    return "make room, then begin again: there is no checkpoint yet"
