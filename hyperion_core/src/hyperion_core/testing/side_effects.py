"""What a call does to the disk and to the network, seen through Python's audit events (PEP 578).

They are raised before the deed, whichever library does it, so a call can also be cut short at any one of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"})
_OUTSIDE = frozenset({
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
})  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Interrupted(BaseException):
    """As Ctrl-C, at a chosen step. From then on every further step raises it too, so nothing is tidied up: to disk
    and network it is as if the process had been killed there."""


@dataclass
class SideEffects:
    """What was seen: descriptions, in order. `steps` holds both the others, and what the test itself adds."""

    stop_at: int | None = None
    writes: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    _opened: list[Path | None] = field(default_factory=list)

    def step(self, what: str, opened: Path | None = None) -> None:
        """Count one step; `opened` is a file that is written anew from here on.

        Raises:
            Interrupted: it is the chosen one, or a later one.
        """
        if self.stop_at is not None and len(self.steps) + 1 >= self.stop_at:
            raise Interrupted(what)
        self.steps.append(what)
        self._opened.append(opened)

    def cut_the_last_file(self) -> None:
        """If the last step before the interruption began a file, leave half of it: it was being written."""
        last = self._opened[-1] if self._opened else None
        if last is not None and last.is_file():
            os.truncate(last, last.stat().st_size // 2)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _OUTSIDE:
            self.outside.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")
            self.step(self.outside[-1])
        elif event in _CHANGES:
            self._write(event, arguments[0], None)
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[2] & _WRITING:
            fresh = arguments[2] & (os.O_TRUNC | os.O_EXCL)
            self._write(event, arguments[0], Path(os.fsdecode(arguments[0])) if fresh else None)

    def _write(self, event: str, path: Any, opened: Path | None) -> None:
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        if text != os.devnull and "__pycache__" not in text:  # that is Python's own
            self.writes.append(f"{event} {text}")
            self.step(self.writes[-1], opened)


_current: SideEffects | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _current is not None:
        _current._see(event, arguments)


@contextmanager
def side_effects(stop_at: int | None = None) -> Iterator[SideEffects]:
    """Inside, changes to the disk, connections and started processes are seen, in every thread.

    Args:
        stop_at: the step, from 1, that raises `Interrupted` in place of being taken.
    """
    global _current, _installed
    if not _installed:  # an audit hook is for ever: it does nothing where nobody watches
        sys.addaudithook(_hook)
        _installed = True
    _current = seen = SideEffects(stop_at)
    try:
        yield seen
    finally:
        _current = None
