"""Checkpoints that are there whole or not at all, and the one to resume from.

A checkpoint is written into a hidden sibling, sealed with the hash of every file, and renamed:

    output_dir/.checkpoint-200.partial/   while it is written
    output_dir/checkpoint-200/            complete: adapter/, optimizer.pt, scheduler.pt, rng_state.pth,
                                          trainer_state.json, engine_state.json, complete.json
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperion_core.artifact import read_json, sha256, write_json
from hyperion_core.errors import ArtifactError

SEAL = "complete.json"
ADAPTER_FOLDER = "adapter"

_NAME = re.compile(r"checkpoint-(\d+)")
_REMAINS = re.compile(r"\.checkpoint-\d+\.(partial|old)")
_log = logging.getLogger("hyperion")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


@contextmanager
def writing_checkpoint(output_dir: Path, step: int) -> Iterator[Path]:
    """Gives an empty folder to write into; it becomes `checkpoint-<step>` when the block ends without an exception."""
    final = checkpoint_path(output_dir, step)
    partial = output_dir / f".{final.name}.partial"
    old = output_dir / f".{final.name}.old"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()  # not its parents: where the output folder has vanished, no run goes on as if nothing were
    try:
        yield partial
        files = {path.relative_to(partial).as_posix(): sha256(path) for path in _files(partial)}
        write_json(partial / SEAL, {"step": step, "files": files})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full of it
        raise
    if final.exists():  # the same step, saved again after its evaluation: a folder cannot replace a folder
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def why_incomplete(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, or ""."""
    try:
        expected = read_json(checkpoint / SEAL).get("files", {})
    except ArtifactError:
        return f"it has no readable {SEAL}"
    for name, digest in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not as it was written"
    return ""


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named like checkpoints, oldest step first, whole or not."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; a damaged one is passed over, with a warning."""
    for path in reversed(checkpoints(Path(output_dir))):
        fault = why_incomplete(path)
        if not fault:
            return path
        _log.warning("%s is passed over: %s", path, fault)
    return None


def remove_remains(output_dir: Path) -> None:
    """Delete what interrupted writes left behind; a complete checkpoint that was being replaced comes back first."""
    for path in output_dir.glob(".checkpoint-*"):
        match = _REMAINS.fullmatch(path.name)
        if not match:
            continue
        final = output_dir / path.name[1:].rpartition(".")[0]
        if match[1] == "old" and not final.exists():
            os.replace(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, *, keep: set[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit`, none of `keep` (the newest and the best)."""
    present = checkpoints(output_dir)
    surplus = len(present) - limit if limit else 0
    for path in [path for path in present if path not in keep][: max(surplus, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
