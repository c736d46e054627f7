"""What a run leaves behind: a folder whose manifest lists every file with its hash, and can be checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .secrets import redacted_data

MANIFEST = "hyperion.json"
ADAPTER = "adapter.json"
FORMAT = 1


@dataclass(frozen=True)
class Artifact:
    """A finished run's folder.

    `adapter` is the content of adapter.json: plugin type, distribution and version, config, base model.
    """

    folder: Path
    adapter: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Artifact:
        """Open an artifact, without checking its hashes.

        Raises:
            ArtifactError: not there, half-written, or of a later format.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ArtifactError(
                f"{folder} has artifact format {manifest.get('format')!r}",
                why=f"this version reads format {FORMAT}",
                fix="use the version of hyperion-ft that wrote it: see its versions in hyperion.json",
            )
        return cls(
            folder,
            read_json(folder / ADAPTER),
            manifest.get("metrics", {}),
            manifest.get("versions", {}),
            manifest.get("data", {}),
        )

    def seal(self) -> Artifact:
        """Write the manifest, last: an artifact without one is half-written."""
        files = {
            path.relative_to(self.folder).as_posix(): sha256(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST and not _is_run_state(path.relative_to(self.folder))
        }
        content = {
            "format": FORMAT,
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "data": dict(self.data),
            "files": files,
        }
        write_json(self.folder / MANIFEST, content)
        return self

    def changed_files(self) -> list[str]:
        """Files that are gone, or are not the bytes that the run wrote."""
        files = read_json(self.folder / MANIFEST).get("files", {})
        return [
            name
            for name, digest in files.items()
            if not (self.folder / name).is_file() or sha256(self.folder / name) != digest
        ]


def _is_run_state(relative: Path) -> bool:
    """Checkpoints belong to the run, not to what it leaves behind."""
    return relative.parts[0].startswith("checkpoint-") or relative.parts[0].startswith(".")


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Of a file's content, in hexadecimal.

    Args:
        progress: is told of every block read, in bytes.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ArtifactError: not there, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path.parent} is no finished artifact: it has no {path.name}",
            why="the run did not end, or this is another folder",
            fix="give the output_dir of a finished run, or resume the run",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read", why=str(error), fix="restore the file from the run") from error
    if not isinstance(content, dict):
        raise ArtifactError(
            f"{path} cannot be read", why="it holds no JSON object", fix="restore the file from the run"
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write whole or not at all: to a sibling, then renamed. Secrets of the environment are masked."""
    sibling = path.with_name(f".{path.name}.partial")
    sibling.write_text(json.dumps(redacted_data(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(sibling, path)
    return path
