"""Every plugin examined in a process of its own, so that none can harm the examination, whatever it does.

`hyperion plugins doctor` shows it; `python -m hyperion_core.doctor` does so where the framework itself is broken, or
not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import examination
from .description import ClassFacts, facts_from
from .distributions import CORE, PluginEntry
from .environment import environment_findings
from .errors import Finding, HyperionError, PluginConflictError, PluginError
from .registry import Registry, registry
from .secrets import redacted_data

#: Seconds that a plugin has, from when its import begins.
TIMEOUT = 60.0
#: Seconds that Python and hyperion-core may take to start, and a process that is told to end to do so.
_GRACE = 60.0
_KEPT_OUTPUT = 2000
_START = """\
import os, sys
sys.path[:] = sys.argv[2].split(os.pathsep)
from hyperion_core.examination import main
main(sys.argv[1])
"""


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found out about one plugin.

    seconds: what importing it took beyond hyperion-core itself; None when it was not imported to the end.
    heavy: the libraries of `examination.HEAVY` that it imported.
    facts: None when its class could not be had.
    """

    entry: PluginEntry
    findings: tuple[Finding, ...]
    seconds: float | None = None
    heavy: tuple[str, ...] = ()
    facts: ClassFacts | None = None

    @property
    def state(self) -> str:
        """ "ok", "warning" or "problem"."""
        return worst(self.findings)


def worst(findings: Iterable[Finding]) -> str:
    """ "problem", "warning", or "ok" when there are none."""
    levels = {finding.level for finding in findings}
    return next((level for level in ("problem", "warning") if level in levels), "ok")


def examine(entries: Iterable[PluginEntry], *, timeout: float = TIMEOUT) -> Iterator[Examination]:
    """Examine plugins, a few at once, each in its own process; gives each examination as it ends.

    Args:
        entries: of distributions; one that was registered in process cannot be examined in another.
        timeout: seconds that each has.
    """
    stop = threading.Event()
    found = registry()
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as workers:
        waiting = [workers.submit(_examine_one, entry, found, timeout, stop) for entry in entries]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:  # Ctrl-C, or a caller that has heard enough
            stop.set()
            for future in waiting:
                future.cancel()


def as_data(environment: Iterable[Finding], examinations: Iterable[Examination]) -> dict[str, Any]:
    """The whole of it as plain data, for JSON."""
    plugins = [
        {
            **examination.entry_data(each.entry),
            "contract": each.entry.contract,
            "state": each.state,
            "seconds": each.seconds,
            "heavy": list(each.heavy),
            "findings": [asdict(finding) for finding in each.findings],
        }
        for each in examinations
    ]
    return {"environment": [asdict(finding) for finding in environment], "plugins": plugins}


def _examine_one(entry: PluginEntry, found: Registry, timeout: float, stop: threading.Event) -> Examination:
    findings = []
    try:
        found.find(entry.kind, entry.name)
    except PluginConflictError as error:
        findings.append(Finding.of(error))
    except PluginError:
        pass  # told below
    try:
        Registry([entry]).find(entry.kind, entry.name)
    except PluginError as error:  # built for another contract, or without what it requires: a run would not import it
        return Examination(entry, (*findings, Finding.of(error)))
    if stop.is_set():
        return Examination(entry, tuple(findings))
    try:
        done = _in_own_process(entry, timeout, stop)
    except OSError as error:  # of this machine: no memory for a process, no room on the disk
        what = f'the {entry.kind} "{entry.name}" of {entry.whose} could not be examined'
        done = Examination(entry, (Finding("problem", what, str(error), "free memory and disk, then try again"),))
    return replace(done, findings=(*findings, *done.findings))


def _in_own_process(entry: PluginEntry, timeout: float, stop: threading.Event) -> Examination:
    with tempfile.TemporaryDirectory(prefix="hyperion-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        order = {"entry": examination.entry_data(entry), "timeout": timeout}
        (folder / examination.ENTRY).write_text(json.dumps(order), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-c", _START, name, os.pathsep.join(map(str, sys.path))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
        )
        output = _Output(process)
        try:
            code = _wait(process, timeout + _GRACE, stop)
        finally:
            output.finish()
        printed = _printed(entry, output)
        try:
            result = json.loads((folder / examination.RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Examination(entry, (_unfinished(entry, folder, code, timeout, output.tail()), *printed))
    findings = (*(Finding(**finding) for finding in result["findings"]), *printed)
    facts = facts_from(result["facts"]) if result["facts"] else None
    return Examination(entry, findings, result["seconds"], tuple(result["heavy"]), facts)


class _Output:
    """Reads all that a process prints, so that it never waits, and keeps the end of it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.size = 0
        self._kept = b""
        self._process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                self.size += len(part)
                self._kept = (self._kept + part)[-_KEPT_OUTPUT:]

    def finish(self) -> None:
        """End the process, and its children where one holds on to the output."""
        if self._process.poll() is None:
            _kill(self._process)
        self._reader.join(1)
        if self._reader.is_alive():
            _kill(self._process)
            self._reader.join(1)
        self._process.wait(_GRACE)

    def tail(self) -> str:
        """The last lines, in printable characters."""
        text = self._kept.decode("utf-8", "replace")
        lines = ["".join(letter for letter in line if letter.isprintable()).strip() for line in text.splitlines()]
        return " / ".join(line[:200] for line in [line for line in lines if line][-3:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _wait(process: subprocess.Popen[bytes], limit: float, stop: threading.Event) -> int | None:
    """Its exit code; None when it had to be ended. The watchdog within it ends it sooner, as a rule."""
    waited = 0.0
    while waited < limit and not stop.is_set():
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            waited += 0.2
    return None


def _printed(entry: PluginEntry, output: _Output) -> list[Finding]:
    if not output.size:
        return []
    what = f'the {entry.kind} "{entry.name}" of {entry.whose} prints while it is imported: {output.size:,} bytes'
    return [Finding("warning", what, f"the last of it: {output.tail()}", f"tell the authors of {entry.distribution}")]


def _unfinished(entry: PluginEntry, folder: Path, code: int | None, timeout: float, tail: str) -> Finding:
    """What ended the process before it could answer."""
    stage = _text(folder / examination.STAGE)
    whose = f'the {entry.kind} "{entry.name}" of {entry.whose}'
    trace = _text(folder / examination.TRACE)
    place = _place(trace, entry)
    fix = f"tell the authors of {entry.distribution}, or python -m pip uninstall {entry.distribution}"
    if not stage:
        return Finding(
            "problem", f"{whose} could not be examined: Python, or {CORE}, did not start",
            tail or f"it ended with exit code {code}", "look at the problems of the environment first",
        )  # fmt: skip
    if code is None or trace.startswith("Timeout"):
        what = f"{whose} hangs: {stage} it did not end within {timeout:g} s"
        return Finding("problem", what, f"it was{place or ' busy'}", f"{fix}; if it is only slow, raise --timeout")
    if code < 0:
        with contextlib.suppress(ValueError):
            return Finding(
                "problem", f"{whose} crashes Python: {stage} it ended the process with {signal.Signals(-code).name}",
                f"it was{place}" if place else tail, fix,
            )  # fmt: skip
    what = f"{whose} ends the process: {stage} it left with exit code {code}"
    return Finding("problem", what, f"it was{place}" if place else tail, fix)


def _place(trace: str, entry: PluginEntry) -> str:
    """Where the watchdog, or the crash, found the plugin: its own innermost line, or the innermost of all."""
    frames = re.findall(r'File "([^"\n]+)", line (\d+)', trace)
    package = entry.value.partition(":")[0].partition(".")[0]
    own = [frame for frame in frames if package in (Path(frame[0]).stem, *Path(frame[0]).parts)]
    return " at {}:{}".format(*(own or frames)[0]) if frames else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def main(arguments: list[str] | None = None) -> int:
    """The same in plain text, without the framework: 0 when all is well, 1 for problems, 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m hyperion_core.doctor", description="Examine every plugin.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these plugins")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that each plugin has")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    try:
        entries = chosen(given.names)
    except HyperionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    environment = environment_findings()
    examinations = sorted(examine(entries, timeout=given.timeout), key=lambda each: entries.index(each.entry))
    if given.json:
        print(json.dumps(redacted_data(as_data(environment, examinations)), indent=2))
    else:
        for each in examinations:
            print(f"{each.state:8} {each.entry.kind} {each.entry.name} ({each.entry.whose})")
        for finding in [*environment, *(finding for each in examinations for finding in each.findings)]:
            print(f"\n{finding.level}: {finding}")
    return int("problem" in (worst(environment), *(each.state for each in examinations)))


def chosen(names: Iterable[str]) -> list[PluginEntry]:
    """The entries that a doctor's NAMEs mean; all of them, public names of plugins too, when none is given.

    Raises:
        PluginNotFoundError: nothing is called so.
    """
    found = registry()
    entries = [entry for name in names for entry in found.named(name)] or found.entries()
    return list(dict.fromkeys(entries))


if __name__ == "__main__":
    sys.exit(main())
