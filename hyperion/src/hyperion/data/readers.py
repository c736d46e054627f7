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
# What a file begins with that is no UTF-8 text, whatever it is called.
_OTHER_KINDS = {
    b"\x1f\x8b": ("it is compressed with gzip", "unpack it: gzip -d"),
    b"\x28\xb5\x2f\xfd": ("it is compressed with zstd", "unpack it: zstd -d"),
    b"PK\x03\x04": ("it is a zip archive, or a spreadsheet", "unpack it, or save it as CSV"),
    b"PAR1": ("it is a parquet file", "let its name end in .parquet"),
    b"\xff\xfe": ("it is UTF-16 text", "save the file as UTF-8"),
    b"\xfe\xff": ("it is UTF-16 text", "save the file as UTF-8"),
}
_JSON_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
_LOOKED_AT = 8192  # bytes at the start of a file that are looked through for zero bytes, as git does


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
        return int(_parquet_metadata(path, label).num_rows)
    if suffix == ".csv":
        return sum(1 for _ in read_rows(path, label))
    with _opened(path, label) as file:
        if suffix in (".json", ".jsonl") and _starts_with_bracket(file):
            return None if path.stat().st_size > LARGEST_COUNTED_JSON else len(_load_array(file, label))
        return sum(1 for line in file if not line.isspace())


def parquet_columns(path: Path, label: str) -> tuple[str, ...]:
    """Column names of a parquet file, without datasets.

    Raises:
        DataError: it is no whole parquet file.
    """
    return tuple(_parquet_metadata(path, label).schema.to_arrow_schema().names)


def _parquet_metadata(path: Path, label: str) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_metadata(path)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{label} is not a readable parquet file", why=str(error), fix="copy or write it again"
        ) from error


@contextmanager
def _opened(path: Path, label: str) -> Iterator[IO[str]]:
    """The file as text. Only csv needs its line ends untouched: a quoted cell may hold some."""
    try:
        _refuse_other_kinds(path, label)
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else "\n") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{label} is not UTF-8 text", why=_not_utf8(path) or str(error),
                        fix="save the file as UTF-8") from error  # fmt: skip
    except OSError as error:
        raise DataError(f"{label} cannot be read", why=error.strerror or str(error),
                        fix="check the path and its permissions") from error  # fmt: skip


def _refuse_other_kinds(path: Path, label: str) -> None:
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    found = next((kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic)), None)
    if found is None and b"\0" in start:
        found = (
            f"byte {start.index(0)} is zero, which no text holds: it is binary, or UTF-16",
            "save it as UTF-8 text",
        )
    if found:
        raise DataError(f"{label} is not UTF-8 text", why=found[0], fix=found[1])


def _not_utf8(path: Path) -> str:
    """Where the file stops being UTF-8, and what stands there."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                before = line[: error.start].decode("utf-8")[-20:]
                byte = f"0x{line[error.start]:02x}"
                return f"line {number} holds the byte {byte} behind {before!r}: Latin-1 or Windows-1252?"
    return ""


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
        except (ValueError, RecursionError) as error:
            if number == 1:
                _refuse_one_object(file, label)
            raise DataError(
                f"{place} is not JSON",
                why=_why_no_json(error),
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
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{label}{line} is not JSON", why=_why_no_json(error), fix="mend the JSON there") from error
    assert isinstance(rows, list)  # it starts with a bracket
    return rows


def _refuse_one_object(file: IO[str], label: str) -> None:
    """Of a file whose first line is not JSON: says so when the whole file is, as one object over many lines."""
    file.seek(0)
    try:
        whole = json.load(file)
    except (ValueError, RecursionError):
        return
    lists = [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    raise DataError(
        f"{label} is one JSON value over several lines, not rows",
        why=f'it is an object with a list under "{lists[0]}"' if lists else "rows are objects, one a line, or a list",
        fix=f'write the list under "{lists[0]}" alone' if lists else "put the rows into a list: [{…}, {…}]",
    )


def _why_no_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return "a number in it has thousands of digits"  # the only other ValueError of json


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{place} is not a JSON object",
        why=f"it is {_JSON_KINDS.get(type(value), 'null')}",
        fix='write each row as an object, for example {"prompt": "…", "completion": "…"}',
    )


def _csv_rows(file: IO[str], label: str, wanted: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB, which long texts are
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(
                f"{label}:1 names the column {', '.join(map(repr, twice))} more than once",
                why="only one of them could be read",
                fix="give every column a name of its own",
            )
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
