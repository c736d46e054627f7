"""The rows of a grid, one after another, each in a process of its own: its memory is its own, and so is its crash."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hyperion_core.artifact import read_json, write_json
from hyperion_core.context import NoProgress, Progress
from hyperion_core.errors import TrainingError, printable
from hyperion_core.secrets import redacted_data

from ..monitoring.metrics import MetricsFile
from .grid import Grid, GridRow, make_grid, shown
from .row import LOG, RESULT, RUN
from .table import write_results

IDENTITY = "grid.json"
_IN_USE = ".in-use.lock"
_SECONDS_BETWEEN_LOOKS = 0.5
# The path first, so that the row finds all that this process finds; -c would put the working directory there.
_ROW = "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); from hyperion.comparison.row import main; main()"


@dataclass(frozen=True)
class Comparison:
    """A grid and its results by row name: {"state": "done", figures}, {"state": "failed" or "refused", "error"}, or
    {"state": "not run"}."""

    grid: Grid
    folder: Path
    results: Mapping[str, Mapping[str, Any]]

    @property
    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if result["state"] == "failed"]


def compare(
    config: str | Path,
    vary: Mapping[str, Sequence[Any]],
    *,
    output_dir: str | Path,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run every combination, and leave compare.json, compare.md and compare.png in `output_dir`.

    All combinations are validated before any is run. Called again with the same arguments it goes on where it ended:
    finished rows are not run again, an interrupted one is resumed, a failed one is tried again.

    Args:
        config: YAML or JSON file of a run, with evaluation data.
        vary: dotted keys of it, each with its values; None takes a key out, and "none" for `quantization.method` is the
            base in full precision.
        tell: is told of each row, in a line.

    Raises:
        ConfigError: the config is refused, or every combination of it.
        TrainingError: the folder is taken, holds another comparison, or cannot be written.
        KeyboardInterrupt: it was stopped; the row that ran has written a checkpoint.
    """
    grid = make_grid(config, vary)
    results: dict[str, Mapping[str, Any]] = {}
    with _claimed(Path(output_dir).expanduser(), grid) as folder:
        for row in grid.rows:
            results[row.name] = {"state": "refused", "error": row.refused} if row.refused else _kept(folder / row.name)
        for number, row in enumerate(grid.rows, start=1):
            what = f"row {number} of {len(grid.rows)}: {described(row)}"
            if row.refused:
                tell(f"{what}: refused: {row.refused}")
            elif results[row.name]["state"] == "done":
                tell(f"{what}: there already")
            else:
                tell(what)
                results[row.name] = _run(row, grid, folder / row.name, progress or NoProgress())
                tell(f"  {outcome(results[row.name])}")
            write_results(folder, grid, results)
    return Comparison(grid, folder, results)


def described(row: GridRow) -> str:
    """ "quantization.method=bnb, quantization.bits=4"."""
    return ", ".join(
        f"{key}={shown(key, value)}"
        for key, value in row.values.items()
        if value is not None or shown(key, None) != "-"
    )


def outcome(result: Mapping[str, Any]) -> str:
    """A row's result in a line."""
    if result["state"] != "done":
        return f"{result['state']}: {result.get('error', '')}"
    before, after = (result[f"perplexity_{when}"] for when in ("before", "after"))
    pair = " → ".join("?" if value is None else f"{value:.4g}" for value in (before, after))
    return f"perplexity {pair}, {result['seconds'] or 0:.0f} s"


@contextmanager
def _claimed(folder: Path, grid: Grid) -> Iterator[Path]:
    """Inside, the folder is this comparison's alone, and of no other grid."""
    identity = redacted_data(
        {"format": 1, "config": dict(grid.config), "vary": {k: list(v) for k, v in grid.vary.items()}}
    )
    try:
        if folder.is_dir() and not (folder / IDENTITY).is_file() and any(p.name != _IN_USE for p in folder.iterdir()):
            raise TrainingError(
                f"the output folder {folder} is not empty, and holds no comparison",
                why="what is there is never overwritten",
                fix="name a folder that does not exist yet",
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _IN_USE)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise TrainingError(
                f"another comparison is writing into {folder}", why=f"it holds {_IN_USE} there",
                fix="wait until it has ended, or name another folder",
            ) from error  # fmt: skip
        try:
            if (folder / IDENTITY).is_file():
                _refuse_other(folder, read_json(folder / IDENTITY), json.loads(json.dumps(identity)))
            else:
                write_json(folder / IDENTITY, identity)
            yield folder
        finally:
            with suppress(OSError):  # while it is held: released first, it could be another comparison's by now
                (folder / _IN_USE).unlink(missing_ok=True)
            lock.release()
    except OSError as error:
        raise TrainingError(
            f"the comparison cannot be written into {folder}",
            why=error.strerror or str(error),
            fix="make room, or name a folder that you may write to; then the same command goes on",
        ) from error


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    then, current = _flat(before), _flat(now)
    changed = [key for key in sorted(then.keys() | current.keys()) if then.get(key) != current.get(key)]
    if changed:
        raise TrainingError(
            f"{folder} holds another comparison",
            why="; ".join(f"{key}: {then.get(key)!r} then, {current.get(key)!r} now" for key in changed[:5]),
            fix="go on with the command and the config that it began with, or name another folder",
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}".removeprefix("config.")
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _kept(folder: Path) -> Mapping[str, Any]:
    """What an earlier attempt left; an unfinished row, and one that failed, is still to be run."""
    kept = read_json(folder / RESULT) if (folder / RESULT).is_file() else {}
    return kept if kept.get("state") == "done" else {"state": "not run"}


def _run(row: GridRow, grid: Grid, folder: Path, progress: Progress) -> Mapping[str, Any]:
    """One row, to its end. What it prints goes into its log."""
    folder.mkdir(exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    asked = json.dumps(
        {"config": str(grid.file.absolute()), "values": dict(row.values), "folder": str(folder.absolute())}
    )
    command = [sys.executable, "-c", _ROW, json.dumps(sys.path), asked]
    with (folder / LOG).open("ab") as log:
        # In a session of its own: Ctrl-C reaches this process alone, which asks the row to stop, once.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _follow(child, folder, row.steps, progress)
        except BaseException:
            _stop(child)
            raise
        finally:
            if child.stdin is not None:
                child.stdin.close()
    if (folder / RESULT).is_file():
        return read_json(folder / RESULT)
    result = {"state": "failed", "error": _why_it_ended(child.returncode, folder / LOG)}
    write_json(folder / RESULT, result)
    return result


def _follow(child: subprocess.Popen[bytes], folder: Path, steps: int | None, progress: Progress) -> None:
    """Wait, and show the optimizer steps that the row has logged."""
    done, metrics = 0, MetricsFile(folder / RUN / "metrics.jsonl")
    with progress.task("  training", steps) as advance:
        while True:
            try:
                child.wait(_SECONDS_BETWEEN_LOOKS)
                return
            except subprocess.TimeoutExpired:
                lines = metrics.read()
                now = int(lines[-1]["step"]) if lines else 0
                advance(max(now - done, 0))
                done = max(now, done)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask for a checkpoint and the end; a second signal ends the row at once."""
    try:
        if child.stdin is not None:
            child.stdin.close()
        child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise


def _why_it_ended(code: int, log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = f"; its last line: {printable(lines[-1])[:200]}" if lines else ""
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            memory = ", which is what a system out of memory does" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{memory}{said}"
    return f"its process ended with exit code {code}{said}"
