"""The files of a rendered deployment, and of a folder, compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..facts import FileRef


def is_inside(path: str) -> bool:
    """A relative path in POSIX form that leads nowhere else, on Windows neither."""
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and not re.search(r"[\\:\0]", path)


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder, with its hash."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def whole(rendered: Mapping[str, bytes | FileRef], package: Path) -> dict[str, bytes]:
    """What was rendered, its references read."""
    return {
        path: (package / content.path).read_bytes() if isinstance(content, FileRef) else content
        for path, content in rendered.items()
    }


def rendered_hash(rendered: Mapping[str, bytes | FileRef], package: Path) -> str:
    """One hash of all paths and contents, whatever their order."""
    files = {path: hashlib.sha256(content).hexdigest() for path, content in whole(rendered, package).items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return sorted(path for path in {*one, *two} if one.get(path) != two.get(path))
