"""Pytest fixtures for plugin authors: `pytest_plugins = ["hyperion_core.testing.fixtures"]`."""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest

from ..registry import Registry, use


@pytest.fixture
def registry() -> Iterator[Registry]:
    """An empty registry in use during the test: what is installed is not seen. `registry.add(MyAdapter, "mine")`."""
    empty = Registry()
    before = use(empty)
    yield empty
    use(before)


@dataclass
class FakeDistributions:
    """Writes distributions as an installer would: importable, with metadata that discovery reads."""

    root: Path
    folders: list[Path] = field(default_factory=list)

    def __call__(
        self,
        name: str,
        entry_points: Mapping[str, Mapping[str, str]],
        modules: Mapping[str, str],
        *,
        version: str = "1.0",
        requires: Sequence[str] = ("hyperion-core>=1,<2",),
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one and put it on the path; gives its folder.

        Args:
            entry_points: by group, {"hyperion.adapters": {"mine": "my_module:Mine"}}.
            modules: source by dotted name, or by path ("package/__init__.py"); indentation is taken off.
            requires: Requires-Dist lines.
            files: more files of the dist-info folder, such as direct_url.json.
        """
        folder = self.root / f"{len(self.folders)}-{name}"
        stem = f"{name.replace('-', '_')}-{version}"
        content = {
            (module if module.endswith(".py") else module.replace(".", "/") + ".py"): dedent(source)
            for module, source in modules.items()
        }
        information = {
            "METADATA": "\n".join(
                ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
                + [f"Requires-Dist: {requirement}" for requirement in requires]
            ),
            "entry_points.txt": "\n".join(
                f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in names.items())
                for group, names in entry_points.items()
            ),
            "INSTALLER": "hyperion_core.testing",
            **(files or {}),
        }
        content |= {f"{stem}.dist-info/{file}": text + "\n" for file, text in information.items()}
        for relative, text in content.items():
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        record = f"{stem}.dist-info/RECORD"
        lines = [f"{relative},{_digest(folder / relative)}" for relative in content] + [f"{record},,"]
        (folder / record).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.folders.append(folder)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        use(None)
        return folder

    def registry(self) -> Registry:
        """Only the distributions written here."""
        return Registry.discover([str(folder) for folder in self.folders])

    def imported(self) -> list[str]:
        """Names of the modules that were imported from the distributions written here."""
        return sorted(
            name
            for name, module in list(sys.modules.items())
            if any(str(getattr(module, "__file__", "") or "").startswith(str(folder)) for folder in self.folders)
        )


@pytest.fixture
def fake_dist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDistributions]:
    """`fake_dist("acme-lora", {"hyperion.adapters": {"acme": "acme_lora:Acme"}}, {"acme_lora": source})`.

    What is installed is discovered anew, the fake included; `fake_dist.registry()` sees the fakes alone. Commands
    run by the `cli` fixture see them too. All is as before after the test.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = use(None)
    use(before)  # it stays until the first distribution is written
    fakes = FakeDistributions(tmp_path / "distributions")
    yield fakes
    for name in fakes.imported():
        del sys.modules[name]
    importlib.invalidate_caches()
    use(before)


@dataclass(frozen=True)
class CommandResult:
    """How a command ended: exit code, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Command:
    """Runs `hyperion` as a user does, in a process of its own."""

    def __init__(self, folder: Path, fakes: FakeDistributions) -> None:
        self.folder = folder
        self._fakes = fakes

    def __call__(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> CommandResult:
        """`cli("validate", "config.yaml")`; runs in the test's tmp_path unless `cwd` says otherwise.

        Args:
            env: added to the environment.
            timeout: seconds after which a command that hangs is ended.

        Raises:
            subprocess.TimeoutExpired: it hung.
        """
        given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, self._fakes.folders), *given]),
            "NO_COLOR": "1",
            "TERM": "dumb",
            "COLUMNS": "200",
            "PYTHONIOENCODING": "utf-8",
            **(env or {}),
        }
        done = subprocess.run(
            [*self.program(env or {}), *map(str, arguments)],
            cwd=cwd or self.folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )
        return CommandResult(done.returncode, done.stdout, done.stderr)

    def program(self, env: Mapping[str, str]) -> Sequence[str]:
        """What stands before the arguments, of a call that adds `env` to the environment."""
        return sys.executable, "-m", "hyperion"


@pytest.fixture
def cli(tmp_path: Path, fake_dist: FakeDistributions) -> Command:
    """The command line: `cli("plugins", "list").stdout`. Sees the distributions of `fake_dist`."""
    return Command(tmp_path, fake_dist)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama of random weights and its tokenizer, loadable by transformers. Do not write to it."""
    pytest.importorskip("transformers")
    from .tiny import save_tiny_base

    folder = tmp_path_factory.mktemp("tiny-base")
    save_tiny_base(folder)
    return folder


def _digest(path: Path) -> str:
    """A RECORD's hash and size."""
    content = path.read_bytes()
    encoded = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"sha256={encoded},{len(content)}"
