"""What makes two runs the same in data and code: content, wherever it lies."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_A_BATCH = 10_000


def data_hashes(train: Dataset, evaluation: Dataset | None) -> dict[str, str | None]:
    """SHA-256 of the tokens and labels of each, in their order."""
    return {"training": _hash(train), "evaluation": None if evaluation is None else _hash(evaluation)}


def source_hash(module: str) -> str | None:
    """SHA-256 of every Python file of the top-level package or module that `module` is in, however its lines end.

    It is not imported for this. None where there is no such source: it is not installed, or typed into an interpreter.
    """
    top = module.partition(".")[0]
    if top in sys.modules:  # a script, __main__, is found nowhere else
        folders = list(getattr(sys.modules[top], "__path__", ()))
        file = getattr(sys.modules[top], "__file__", None)
    else:
        spec = importlib.util.find_spec(top)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        file = spec.origin if spec else None
    found = [(path.relative_to(folder), path) for folder in map(Path, folders) for path in folder.rglob("*.py")]
    if not folders and file and Path(file).is_file():
        found = [(Path(Path(file).name), Path(file))]
    if not found:
        return None
    digest = hashlib.sha256()
    for relative, path in sorted(found):
        digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def cache_identity(plugin: object) -> str:
    """The source behind a plugin, for a cache key: its package's or module's hash.

    Without source it is a value of its own each time, so that nothing that depends on it is taken from a cache.
    """
    return source_hash(type(plugin).__module__) or uuid.uuid4().hex


def _hash(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(_ROWS_A_BATCH):
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
