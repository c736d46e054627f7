"""What the `dataset` argument means: which source of rows a name, a path or an object stands for.

Only names are looked at: no file is opened, no package imported, nothing downloaded.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hyperion_core.errors import DataError
from hyperion_core.suggest import closest

from .sources import FileSource, HubSource, RowSource, SavedSource, Source, TableSource

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".text")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_PACKAGE = "package://"


def find_source(
    dataset: Any,
    *,
    base_dir: str | Path | None = None,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
) -> Source:
    """What `dataset` means. A local path that exists wins over a hub id of the same spelling.

    Raises:
        DataError: it is of no known kind, or a file, folder or package resource that is not there.
    """
    if isinstance(dataset, Path):
        dataset = str(dataset)
    if isinstance(dataset, str):
        return _find_named(dataset, Path(base_dir or "."), split, name, revision)
    if type(dataset).__module__.partition(".")[0] == "datasets":
        if type(dataset).__name__ == "Dataset":
            return TableSource(dataset)
        raise DataError(
            f"the dataset is a {type(dataset).__name__}, and one datasets.Dataset is needed",
            why="it holds several splits, or has no length",
            fix='pass one split, for example dataset["train"]',
        )
    if isinstance(dataset, Sequence) and not isinstance(dataset, (bytes, bytearray)):
        wrong = next((n for n, row in enumerate(dataset) if not isinstance(row, Mapping)), None)
        if wrong is None:
            return RowSource(dataset)
        raise DataError(
            f"row {wrong} of the list is {type(dataset[wrong]).__name__}, not a mapping",
            why="a row has names for its texts",
            fix='write rows as mappings, for example {"prompt": "…", "completion": "…"}',
        )
    raise DataError(
        f"a dataset cannot be {type(dataset).__name__}",
        why="it is read from files, from the hub, or row by row",
        fix="give a hub id, a path, package://<package>/<file>, a datasets.Dataset, or a list of mappings",
    )


def _find_named(given: str, base: Path, split: str, name: str | None, revision: str | None) -> Source:
    if given.startswith(_PACKAGE):
        return _find_local(given, package_path(given), split)
    if "://" in given:
        raise DataError(
            f"{given} is an address, which data is not read from",
            why="data is a file or folder here, or a dataset of the hub",
            fix="download it and give its path; write a dataset of the hub as owner/name",
        )
    try:
        path = base / Path(given).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:  # a name of 5000 characters, the home of nobody
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{given} cannot be a path", why=why, fix="give a hub id, or the path of a file") from error
    if there:
        return _find_local(given, path, split)
    looks_local = Path(given).suffix.lower() in SUFFIXES or given[:1] in ("/", ".", "~") or "\\" in given
    if looks_local or not _HUB_ID.fullmatch(given):
        raise DataError(f"there is no file or folder {given}", why=f"looked for {path.absolute()}", fix=_beside(path))
    return HubSource(given, name, split, revision)


def _beside(path: Path) -> str:
    """What the path may have been meant to be."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(p.name for p in path.parent.iterdir())
    if best := closest(path.name, names):
        return f'did you mean "{best}"?'
    files = [name for name in names if Path(name).suffix.lower() in SUFFIXES and name[0] != "."]
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return f"of this kind there are {', '.join(files[:5])}{more}" if files else "give the path of a file, or a hub id"


def _find_local(given: str, path: Path, split: str) -> Source:
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            return FileSource(given, [path])
        raise DataError(
            f"{given} is no file of rows",
            why=f'files end in {", ".join(SUFFIXES)}, this one in "{path.suffix}"',
            fix=_other_suffix_fix(path),
        )
    if not path.is_dir():
        raise DataError(
            f"there is no file or folder {given}",
            why=f"looked for {path}",
            fix=_beside(path),
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return SavedSource(given, path, split)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    kinds = sorted({p.suffix.lower() for p in files})
    if not files:
        raise DataError(
            f"the folder {given} holds no rows",
            why=f"no file in it ends in {', '.join(SUFFIXES)}",
            fix="name the file itself, or the folder that the files are in",
        )
    if len(kinds) > 1:
        raise DataError(
            f"the folder {given} holds files of several kinds: {', '.join(kinds)}",
            why="which of them are the data is not certain",
            fix="name one file, or keep the data in a folder of its own",
        )
    return FileSource(given, files)


def _other_suffix_fix(path: Path) -> str:
    packed = {".gz": "gzip -d", ".zst": "zstd -d", ".bz2": "bzip2 -d", ".xz": "xz -d", ".zip": "unzip"}
    if unpack := packed.get(path.suffix.lower()):
        return f"unpack it: {unpack} {path.name}"
    return "save the rows as .jsonl or .csv; if it is text, let its name end in .txt"


def package_path(uri: str) -> Path:
    """The file or folder behind `package://<package>/<path>`. The package is found, and not imported.

    Raises:
        DataError: there is no such package, or the path would leave it.
    """
    package, _, inside = uri.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not inside or ".." in PurePosixPath(inside).parts:
        raise DataError(
            f"{uri} is no resource of a package",
            why="its path would leave the package" if ".." in inside else "it names no package, or no file in it",
            fix="write package://<package>/<path inside it>",
        )
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise DataError(
            f'the package "{package}" of {uri} is not installed',
            why=f'this Python environment has no package "{package}"',
            fix="install the distribution that holds it with pip",
        )
    paths = [Path(folder, inside) for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])
