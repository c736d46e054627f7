"""Kinds of sources of rows: local files, a hub dataset, a `datasets.Dataset`, a saved one, and a list of mappings.

Neither datasets nor pyarrow is imported before the rows are asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hyperion_core.artifact import sha256
from hyperion_core.errors import DataError

from .readers import count_rows, parquet_columns, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_LOOKED_AT = 100  # rows whose keys count as the columns of a file without a header


class Source(Protocol):
    """Rows, and what is known of them."""

    kind: str
    label: str

    def columns(self) -> tuple[str, ...] | None:
        """Column names as far as they are known without importing datasets; None when they are not."""

    def cheap_count(self) -> int | None:
        """Rows, without importing torch or datasets; None when that cannot be known."""

    def first_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, row) of the first rows, as far as they are read without importing datasets; else nothing."""

    def open(self) -> OpenSource:
        """The rows themselves. Raises DataError when they cannot be had."""

    def describe(self) -> dict[str, Any]:
        """What an artifact says of its data: kind, files with hashes, revision."""


class OpenSource(Protocol):
    """A source whose rows can be read."""

    columns: tuple[str, ...]

    def count(self) -> int: ...

    def identity(self) -> str:
        """A hash that changes when the rows do; the same on every machine for the same files."""

    def rows(self, columns: Sequence[str], wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, row) of the rows for which `wanted` (N truth values; None is all) is true, with those columns."""


class FileSource:
    """Local json, jsonl, csv, text or parquet files, in the order of their names."""

    kind = "files"

    def __init__(self, given: str, paths: Sequence[Path]) -> None:
        self.label = given
        self.paths = tuple(paths)

    @property
    def _parquet(self) -> bool:
        return self.paths[0].suffix.lower() == ".parquet"

    def columns(self) -> tuple[str, ...] | None:
        if self._parquet:
            return tuple(dict.fromkeys(name for path in self.paths for name in parquet_columns(path, path.name)))
        found: dict[str, None] = {}
        for path in self.paths:
            for _, row in islice(read_rows(path, path.name), _ROWS_LOOKED_AT):
                found.update(dict.fromkeys(row))
        return tuple(found)

    def cheap_count(self) -> int | None:
        counts = [count_rows(path, path.name) for path in self.paths]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def first_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self._parquet:
            return iter(())
        return islice((row for path in self.paths for row in read_rows(path, path.name)), _ROWS_LOOKED_AT)

    def open(self) -> OpenSource:
        if not self._parquet:
            return _OpenFiles(self)
        files = [str(path) for path in self.paths]
        table = _load(self.label, "parquet", data_files={"train": files}, split="train")
        return OpenTable(table, self.label, identity=self.digest)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of every file."""
        return tuple(sha256(path) for path in self.paths)

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        files = [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(self.paths, self.hashes, strict=True)
        ]
        return {"files": files}


class _OpenFiles:
    def __init__(self, source: FileSource) -> None:
        self._source = source
        self.columns = source.columns() or ()

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        counted = []
        for path in self._source.paths:
            count = count_rows(path, path.name)
            counted.append(sum(1 for _ in read_rows(path, path.name)) if count is None else count)
        return tuple(counted)

    def count(self) -> int:
        return sum(self._counts)

    def identity(self) -> str:
        return self._source.digest

    def rows(self, columns: Sequence[str], wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        start = 0
        for number, path in enumerate(self._source.paths):
            if wanted is None:
                yield from read_rows(path, path.name)
            else:
                stop = start + self._counts[number]
                yield from read_rows(path, path.name, wanted[start:stop])
                start = stop


class RowSource:
    """A list of mappings."""

    kind = "rows"
    label = "the list of rows"

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows

    def columns(self) -> tuple[str, ...] | None:
        return tuple(dict.fromkeys(column for row in self._rows[:_ROWS_LOOKED_AT] for column in row))

    def cheap_count(self) -> int | None:
        return len(self._rows)

    def first_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return islice(self.open().rows((), None), _ROWS_LOOKED_AT)

    def open(self) -> OpenSource:
        return _OpenRows(self._rows, self.columns() or ())

    def describe(self) -> dict[str, Any]:
        return {}


class _OpenRows:
    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...]) -> None:
        self._rows = rows
        self.columns = columns

    def count(self) -> int:
        return len(self._rows)

    def identity(self) -> str:
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(repr(sorted(row.items(), key=lambda item: str(item[0]))).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def rows(self, columns: Sequence[str], wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, row in enumerate(self._rows):
            if wanted is None or wanted[number]:
                yield f"row {number}", row


class TableSource:
    """A `datasets.Dataset` that the caller holds."""

    kind = "dataset"
    label = "the dataset"

    def __init__(self, table: Dataset) -> None:
        self._table = table

    def columns(self) -> tuple[str, ...] | None:
        return tuple(self._table.column_names)

    def cheap_count(self) -> int | None:
        return int(self._table.num_rows)

    def first_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return islice(self.open().rows(self._table.column_names, None), _ROWS_LOOKED_AT)

    def open(self) -> OpenSource:
        return OpenTable(self._table, self.label)

    def describe(self) -> dict[str, Any]:
        return {"source_fingerprint": self._table._fingerprint}


class SavedSource:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""

    kind = "saved dataset"

    def __init__(self, given: str, folder: Path, split: str) -> None:
        self.label = given
        self._folder = folder
        self._split = split

    def columns(self) -> tuple[str, ...] | None:
        return None

    def cheap_count(self) -> int | None:
        return None

    def first_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return iter(())

    def open(self) -> OpenSource:
        return OpenTable(self._table, self.label)

    @cached_property
    def _table(self) -> Dataset:
        import datasets

        try:
            saved = datasets.load_from_disk(str(self._folder))
        except Exception as error:
            raise DataError(
                f"{self.label} is not a readable saved dataset", why=str(error), fix="save or copy it again"
            ) from error
        if isinstance(saved, datasets.Dataset):
            return saved
        if self._split not in saved:
            raise DataError(
                f'{self.label} has no split "{self._split}"',
                why=f"its splits are {', '.join(map(str, saved))}",
                fix="name one of them as `split`",
            )
        return saved[self._split]

    def describe(self) -> dict[str, Any]:
        return {"split": self._split, "source_fingerprint": self._table._fingerprint}


class HubSource:
    """A dataset of the Hugging Face hub; `name` is its configuration."""

    kind = "hub"

    def __init__(self, given: str, name: str | None, split: str, revision: str | None) -> None:
        self.label = given
        self._name = name
        self._split = split
        self._revision = revision

    def columns(self) -> tuple[str, ...] | None:
        return None

    def cheap_count(self) -> int | None:
        return None

    def first_rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return iter(())

    def open(self) -> OpenSource:
        return OpenTable(self._table, self.label)

    @cached_property
    def _table(self) -> Dataset:
        return _load(self.label, self.label, name=self._name, split=self._split, revision=self._revision)

    def describe(self) -> dict[str, Any]:
        known = {"split": self._split, "config": self._name, "revision": self._revision}
        if "_table" not in self.__dict__:
            return known
        sums = self._table.info.download_checksums or {}
        commits = {match[1] for url in sums if (match := re.search(r"@([0-9a-f]{40})/", str(url)))}
        if len(commits) == 1:
            known["revision"] = commits.pop()
        return {**known, "source_fingerprint": self._table._fingerprint}


class OpenTable:
    """Rows of a `datasets.Dataset`, read in batches and only the columns asked for."""

    def __init__(self, table: Dataset, label: str, identity: str | None = None) -> None:
        self._table = table.with_format(None)  # a "torch" format would give tensors for texts
        self._label = label
        self._identity = table._fingerprint if identity is None else identity
        self.columns = tuple(table.column_names)

    def count(self) -> int:
        return int(self._table.num_rows)

    def identity(self) -> str:
        return self._identity

    def rows(self, columns: Sequence[str], wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        table = self._table.select_columns(list(columns))
        numbers: Sequence[int] = range(len(table))
        if wanted is not None:
            import numpy as np

            numbers = np.flatnonzero(wanted).tolist()
            table = table.select(numbers)
        done = 0
        for batch in table.iter(batch_size=1000):
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield f"{self._label}, row {numbers[done]}", dict(zip(columns, values, strict=True))
                done += 1


def _load(label: str, *args: Any, **kwargs: Any) -> Dataset:
    """`datasets.load_dataset`, its many errors as one of ours."""
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        shown = cause or error
        if isinstance(error, ConnectionError):
            fix = "check the network and HF_HUB_OFFLINE, or download the data and give its path"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            fix = "check the spelling, sign in with `hf auth login` if it is private or gated, or give a local path"
        else:
            fix = "check `split`, `name` and `revision`, and that the files are whole"
        raise DataError(
            f"the dataset {label} cannot be loaded", why=f"{type(shown).__name__}: {shown}", fix=fix
        ) from error
