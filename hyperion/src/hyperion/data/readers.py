"""Rows of local json, jsonl, csv and text files, one at a time, each with the place it stands at.

The files are read here and not by `datasets`' loaders because those guess types (a column of dates becomes
timestamps, the csv text "None" a missing value) and cannot say which line is wrong. `datasets` still writes the
prepared rows to memory-mapped Arrow.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hyperion_core.errors import DataError

# The json array of a file is held in memory while it is read; larger ones are not parsed just to be counted.
LARGEST_COUNTED_JSON = 256 * 2**20

_READ_BLOCK = 2**20


def read_rows(path: Path, label: str, wanted: Any = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (place, row) of one file; `label` is the file's name in places such as "train.jsonl:17".

    `wanted` holds a truth value for each row, and rows it does not want are not decoded; None wants all.
    Blank lines of jsonl and text files are no rows.

    Raises:
        DataError: the file cannot be read or decoded; names the line.
    """
    suffix = path.suffix.lower()
    with _opened(path, label) as file:
        if suffix == ".csv":
            yield from _csv_rows(file, label, wanted)
        elif suffix in (".txt", ".text"):
            for number, line in _filled_lines(file, wanted):
                yield f"{label}:{number}", {"text": line.rstrip("\r\n")}
        elif _starts_with_bracket(file):
            yield from _array_rows(file, label, wanted)
        else:
            yield from _json_lines(file, label, wanted)


def count_rows(path: Path, label: str) -> int | None:
    """Rows of one file, without decoding them where that is possible; None when only a long parse would tell."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return int(parquet.read_metadata(path).num_rows)
        except (ArrowException, OSError) as error:
            raise DataError(f"{label} is not a readable parquet file", why=str(error)) from error
    if suffix == ".csv":
        return sum(1 for _ in read_rows(path, label))
    with _opened(path, label) as file:
        if suffix in (".json", ".jsonl") and _starts_with_bracket(file):
            return None if path.stat().st_size > LARGEST_COUNTED_JSON else len(_load_array(file, label))
        return sum(1 for line in file if not line.isspace())


@contextmanager
def _opened(path: Path, label: str) -> Iterator[IO[str]]:
    """The file as text. Only csv needs its line ends untouched: a quoted cell may hold some."""
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else "\n") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{label} is not UTF-8 text", why=str(error), fix="save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{label} cannot be read", why=str(error), fix="check the path and its permissions") from error


def _starts_with_bracket(file: IO[str]) -> bool:
    while block := file.read(_READ_BLOCK):
        if filled := block.lstrip():
            file.seek(0)
            return filled[0] == "["
    file.seek(0)
    return False


def _filled_lines(file: IO[str], wanted: Any) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank and are wanted."""
    row = 0
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        if wanted is None or wanted[row]:
            yield number, line
        row += 1


def _json_lines(file: IO[str], label: str, wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _filled_lines(file, wanted):
        place = f"{label}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{place} is not JSON",
                why=str(error),
                fix="write one JSON object a line, or one list of objects for the whole file",
            ) from error
        yield place, _object(value, place)


def _array_rows(file: IO[str], label: str, wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for row, value in enumerate(_load_array(file, label)):
        if wanted is None or wanted[row]:
            place = f"{label}, row {row + 1}"
            yield place, _object(value, place)


def _load_array(file: IO[str], label: str) -> list[Any]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{label}:{error.lineno} is not JSON", why=str(error), fix="mend the JSON at that line"
        ) from error
    assert isinstance(rows, list)  # it starts with a bracket
    return rows


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{place} is not a JSON object",
        why=f"it is {type(value).__name__}",
        fix='write each row as an object, for example {"prompt": "…", "completion": "…"}',
    )


def _csv_rows(file: IO[str], label: str, wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB, which long texts are
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        row = 0
        for cells in reader:
            if not cells:
                continue
            place = f"{label}:{reader.line_num}"
            if len(cells) != len(header):
                raise DataError(
                    f"{place} has {len(cells)} cells where the header has {len(header)}",
                    why="a comma or a quote inside a cell is not quoted",
                    fix='put the cell in double quotes, and write a quote inside it as ""',
                )
            if wanted is None or wanted[row]:
                yield place, dict(zip(header, cells, strict=True))
            row += 1
    except csv.Error as error:
        raise DataError(
            f"{label}:{reader.line_num} is not CSV", why=str(error), fix="check the quotes up to that line"
        ) from error
