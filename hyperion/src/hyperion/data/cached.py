"""Cached rows and tokens that a disk, or a hand, has damaged are taken away, so that they are made again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger("hyperion")


def drop_damaged_tokens(file: Path, rows: int) -> None:
    """Removes the tokens that `Dataset.map` keeps in `file`, or in parts beside it, unless they are whole.

    Args:
        rows: how many they must be.
    """
    parts = sorted(file.parent.glob(f"{file.stem}*.arrow"))
    if parts and _rows(parts) != rows:
        log.warning("the tokens in %s are damaged: they are made again", file)
        for part in parts:
            part.unlink()


def drop_damaged_rows(fingerprint: str) -> None:
    """Removes the prepared rows of this fingerprint from datasets' cache, unless they are whole."""
    import datasets

    for folder in Path(datasets.config.HF_DATASETS_CACHE).glob(f"generator/*{fingerprint}*/*"):
        if folder.is_dir() and not _is_whole(folder):
            log.warning("the prepared rows in %s are damaged: they are made again", folder)
            shutil.rmtree(folder)


def _is_whole(folder: Path) -> bool:
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        expected = {name: split["num_examples"] for name, split in info["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(_rows(sorted(folder.glob(f"*-{name}*.arrow"))) == count for name, count in expected.items())


def _rows(files: Iterable[Path]) -> int | None:
    """Rows of Arrow streams, of which only the headers are read; None when one breaks off."""
    import pyarrow

    count = 0
    for path in files:
        try:
            with pyarrow.memory_map(str(path)) as source:
                count += pyarrow.ipc.open_stream(source).read_all().num_rows
        except (pyarrow.ArrowException, OSError):
            return None
    return count
