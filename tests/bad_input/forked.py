"""`hyperion` in processes that are forked from one that has imported all it needs: for each case anew, imports would
take most of the time. What a case finds is the same: the page of errors is written by either."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hyperion_core.testing.fixtures import CommandResult

#: As `hyperion_core.testing.fixtures.Command` has them.
TERMINAL = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hyperion.cli.main", "hyperion.engine.fit", "hyperion.pipeline"])


def forked(
    arguments: Sequence[str | Path], *, folder: Path, path: Sequence[Path], env: Mapping[str, str], timeout: float
) -> CommandResult:
    """Run the command in `folder`, with `path` before all that is installed.

    Args:
        env: added to the environment; nothing that is read on import.

    Raises:
        subprocess.TimeoutExpired: it hung.
    """
    printed = [folder.parent / name for name in ("stdout", "stderr", "code")]
    process = _context.Process(
        target=_run,
        args=([str(each) for each in arguments], str(folder), [str(each) for each in path], dict(env), printed),
    )
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(["hyperion", *map(str, arguments)], timeout)
    # not process.exitcode: where two threads start processes, each looks after the other's, and one finds it gone
    out, err, code = (file.read_text(encoding="utf-8") for file in printed)
    return CommandResult(int(code), out, err)


def _run(arguments: list[str], folder: str, path: list[str], env: dict[str, str], printed: list[Path]) -> None:
    for number, file in enumerate(printed[:2], start=1):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), number)
    os.chdir(folder)
    os.environ.update({**TERMINAL, **env, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])})
    sys.path[:0] = [folder, *path]
    sys.argv[1:] = arguments
    from hyperion.cli.main import run

    code: object = 1  # of an error that nothing caught
    try:
        run()
    except SystemExit as stop:
        code = stop.code or 0
        raise
    finally:
        printed[2].write_text(str(code), encoding="utf-8")
