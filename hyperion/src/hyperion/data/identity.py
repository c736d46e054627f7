"""What makes two runs' data the same: content, not names."""

from __future__ import annotations

import hashlib
import inspect
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_A_BATCH = 10_000


def data_hashes(train: Dataset, evaluation: Dataset | None) -> dict[str, str | None]:
    """SHA-256 of the tokens and labels of each, in their order."""
    return {"training": _hash(train), "evaluation": None if evaluation is None else _hash(evaluation)}


def source_hash(plugin: type) -> str:
    """SHA-256 of the Python source behind a plugin: its package's files, or its module.

    A plugin whose source cannot be read (typed into an interpreter) gets a value of its own each time, so that
    nothing that depends on it is taken from a cache.
    """
    try:
        file = Path(inspect.getfile(plugin))
    except (TypeError, OSError):
        return uuid.uuid4().hex
    if not file.is_file():
        return uuid.uuid4().hex
    in_package = "." in plugin.__module__ or file.name == "__init__.py"
    files = sorted(file.parent.rglob("*.py")) if in_package else [file]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(file.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _hash(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(_ROWS_A_BATCH):
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
