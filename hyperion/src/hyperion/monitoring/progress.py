"""How far a run is: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class RichProgress:
    """A `hyperion_core.context.Progress` on stderr.

    All tasks share one display, so that a short one (evaluating) may run inside a long one (training).
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )

    @property
    def live(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self.console.is_terminal

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Inside, calling the given function with n says that n more units of `total` are done."""
        if not self.live:
            lines = _Lines(self, description, total)
            yield lines.advance
            lines.end()
            return
        task = self.open(description, total)
        try:
            yield lambda done: self._bars.advance(task, done)
        finally:
            self.close(task)

    def open(self, description: str, total: int | None) -> TaskID:
        """A bar that stays until it is closed; for a terminal only."""
        self._bars.start()
        return self._bars.add_task(description, total=total, note="")

    def set(self, task: TaskID, *, completed: int, note: str) -> None:
        """Where a bar stands, and what is written behind it."""
        self._bars.update(task, completed=completed, note=note)

    def close(self, task: TaskID) -> None:
        self._bars.remove_task(task)
        if not self._bars.tasks:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print lines above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """A task where there is no terminal: silent when it is quick."""

    def __init__(self, progress: RichProgress, description: str, total: int | None) -> None:
        self.progress = progress
        self.description = description
        self.total = total
        self.done = 0
        self.started = self.said = time.monotonic()

    def advance(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.said >= _SECONDS_BETWEEN_LINES:
            self.said = now
            of_total = f"/{self.total}" if self.total else ""
            self.progress.say(f"{self.description}: {self.done}{of_total}")

    def end(self) -> None:
        seconds = time.monotonic() - self.started
        if seconds >= _SECONDS_BETWEEN_LINES:
            whole = not self.total or self.done >= self.total
            ended = f"done, {self.done}" if whole else f"ended at {self.done}/{self.total},"
            self.progress.say(f"{self.description}: {ended} in {seconds:.0f} s")
