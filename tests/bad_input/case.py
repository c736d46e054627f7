"""What a case of bad input is, where it takes place, and how it ended."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from forking import ForkingCommand
from hyperion_core.registry import use
from hyperion_core.testing.fixtures import CommandResult, FakeDistributions

#: Ten rows that the tiny model learns from without complaint.
ROWS = tuple({"prompt": f"What is {n} and {n}?", "completion": f" It is {n + n}."} for n in range(10))


@dataclass
class Place:
    """A folder of one case: the command runs in it, and nothing outside it is touched.

    `env` is added to the command's environment; `HYPERION_CACHE` is already a folder of the case's own.
    """

    folder: Path
    tiny_model: Path
    fake_dist: FakeDistributions
    env: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file below the folder; gives its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, rows: Sequence[Mapping[str, Any]] = ROWS, name: str = "rows.jsonl") -> Path:
        """A file of rows; gives its path."""
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def config(self, name: str = "config.yaml", **changes: Any) -> str:
        """A config that is valid but for the changes, with its rows; gives its name. `...` takes a key out.

        A mapping changes the mapping that stands there: `training={"max_steps": -5}` keeps the rest of `training`.
        """
        if not (self.folder / "rows.jsonl").exists():
            self.rows()
        config: dict[str, Any] = {
            "base_model": str(self.tiny_model),
            "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
            "dataset": {"dataset": "rows.jsonl", "validation_split": 2},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "eval_samples": 0},
        }
        self.write(name, yaml.safe_dump(_changed(config, changes), sort_keys=False, allow_unicode=True))
        return name


@dataclass(frozen=True)
class Case:
    """One thing that a user gets wrong.

    Args:
        area: "config", "data", "model", "quantization", "plugins", "disk" or "command line".
        what: what the user did, as a cell of the table in the docs: "a key is misspelt".
        arrange: writes files below `place.folder`; gives the arguments of `hyperion`.
        says: texts that must all stand on stderr: what, whose, why, fix.
        leaves: glob patterns of what may stay behind, relative to the folder (`**` takes in subfolders): for runs
            that are stopped in the middle.
    """

    area: str
    what: str
    arrange: Callable[[Place], Sequence[str | Path]]
    says: tuple[str, ...]
    leaves: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.area}: {self.what}"


@dataclass(frozen=True)
class Outcome:
    """How a case ended: what was printed, with the paths of this machine taken out, and what changed on disk."""

    result: CommandResult
    error: str
    left: tuple[str, ...]


@contextmanager
def place_for(case: Case, root: Path, tiny_model: Path) -> Iterator[tuple[Place, Sequence[str | Path]]]:
    """Arrange one case in a new folder. What `fake_dist` changes in this process is put back."""
    folder = root / "work"
    folder.mkdir(parents=True)
    path, before = list(sys.path), use(None)
    use(before)
    try:
        place = Place(folder, tiny_model, FakeDistributions(root / "distributions"))
        place.env["HYPERION_CACHE"] = str(root / "cache")
        yield place, case.arrange(place)
    finally:
        sys.path[:] = path
        use(before)


def run_case(case: Case, place: Place, arguments: Sequence[str | Path], timeout: float) -> Outcome:
    """Run the command as a user does.

    Raises:
        subprocess.TimeoutExpired: it hung.
    """
    before = _files(place.folder)
    result = ForkingCommand(place.folder, place.fake_dist)(*arguments, env=place.env, timeout=timeout)
    after = _files(place.folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    changed -= {
        path.relative_to(place.folder).as_posix() for leaves in case.leaves for path in place.folder.glob(leaves)
    }
    return Outcome(result, _without_paths(result.stderr, place), tuple(sorted(changed)))


def _changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(config)
    for key, value in changes.items():
        if value is ...:
            changed.pop(key, None)
        elif isinstance(value, dict) and isinstance(changed.get(key), dict):
            changed[key] = _changed(changed[key], value)
        else:
            changed[key] = value
    return changed


def _files(folder: Path) -> dict[str, str]:
    """Every file below, and a digest of what it holds. An empty folder is nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(folder).as_posix()] = os.readlink(path)
        elif path.is_file():
            try:
                content = path.read_bytes()
            except PermissionError:
                content = b""
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def _without_paths(text: str, place: Place) -> str:
    """What stands in the docs: the same on every machine."""
    root = place.folder.parent
    for path, name in ((place.folder, "."), (place.tiny_model, "tiny-model"), (root, "..")):
        text = text.replace(f"{path.resolve()}/", f"{name}/").replace(str(path.resolve()), name)
        text = text.replace(f"{path}/", f"{name}/").replace(str(path), name)
    return re.sub(r"(?<![\w.])\./(?=\w)", "", text)
