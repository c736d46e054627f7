"""`hyperion` in processes forked from one that has imported all that it needs.

A command spends six to ten seconds on importing torch, transformers and peft, and less on what a test asks of it. What
a test starts is `client.py`, a process as any other: its arguments, environment, folder, standard streams, exit code
and signals are those of a child that `server.py` forks for it. What depends on the imports themselves, such as
variables that a library reads when it is imported, needs a process of its own: `Command` of hyperion_core.testing.
"""

from __future__ import annotations

import atexit
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
from hyperion_core.testing.fixtures import Command, FakeDistributions

_HERE = Path(__file__).parent
#: Variables that nothing reads on import; of PYTHONPATH, the server sees to it.
READ_LATE = frozenset({"HYPERION_CACHE", "PYTHONPATH"})


def forking_hyperion() -> tuple[str, ...]:
    """What to put before a command's arguments, in place of `python -m hyperion`."""
    return _client("hyperion") if hasattr(os, "fork") else (sys.executable, "-m", "hyperion")


def forking_python(folder: Path) -> Path:
    """Write a `python` into `folder` that forks what it is given as `-c CODE` or `FILE.py`, in which it is
    `sys.executable`; for all else it is this interpreter. Gives its path."""
    if not hasattr(os, "fork"):
        return Path(sys.executable)
    return _python(folder / "python", str(folder / "python"), sys.executable)


def fork_in(scripts: Path) -> None:
    """Make such a `python`, and `hyperion`, of the folder of programs of a virtual environment."""
    if hasattr(os, "fork"):
        own = str((scripts / "python").rename(scripts / "python-itself"))
        _python(scripts / "python", own, own)
        _script(scripts / "hyperion", f'exec {shlex.join(_client("hyperion", own))} "$@"')


def _python(file: Path, seems: str, otherwise: str) -> Path:
    fork = shlex.join(_client("python", seems))
    return _script(file, f'case "$1" in -c|*.py) exec {fork} "$@";; esac\nexec {shlex.quote(otherwise)} "$@"')


def _script(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def _client(program: str, interpreter: str = "") -> tuple[str, ...]:
    return sys.executable, "-I", "-S", str(_HERE / "client.py"), str(_server()), interpreter, program


@cache
def _server() -> Path:
    """Start it, to run until this process ends; gives its socket."""
    folder = tempfile.TemporaryDirectory(prefix="hyperion-forking-")
    address = Path(folder.name, "socket")
    environment = os.environ | {
        "HF_HOME": str(Path(folder.name, "hf")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    server = subprocess.Popen(
        [sys.executable, str(_HERE / "server.py"), str(address)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "it printed why"
    atexit.register(folder.cleanup)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # the first of the three
    return address


class ForkingCommand(Command):
    """Forks, but where the environment is given a variable that may be read on import."""

    def program(self, env: Mapping[str, str]) -> Sequence[str]:
        return forking_hyperion() if env.keys() <= READ_LATE else super().program(env)


@pytest.fixture
def cli(tmp_path: Path, fake_dist: FakeDistributions) -> ForkingCommand:
    """That of hyperion_core.testing, without the seconds that it takes to import."""
    return ForkingCommand(tmp_path, fake_dist)
