"""Which LoRA settings reach the usual ones' final loss soonest, in steps and in seconds.

    nox -s bench -- convergence                   an hour or more on two cores; begun again, it goes on where it was
    python benchmarks/convergence.py --quick      tiny random models, to see that it works: some minutes
    python benchmarks/convergence.py --report     only write the report again

Two tasks: instructions answered in words, and messages that become a form of three fields; other rows of each are held
out. The baseline is plain LoRA (rank 16, q_proj and v_proj) with the default schedule; its learning rate is tuned on
each task. Candidates have one setting for both tasks, and a schedule as long as they are given.

Nothing else should run meanwhile, for seconds are compared; those that the result is reckoned with are taken last, of
plain transformers and PEFT, baseline and winner in turn. Every run is kept in benchmarks/results/convergence.json
under a hash of its whole setting as soon as it is over, and is not made again; a table and a plot are written beside
it. `--hours` counts the runs of all starts together; what is not reached by then is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from convergence_candidates import CANDIDATES
from convergence_runs import BASE, PRELOADED, Task, real_tasks, run_into, tiny_tasks
from convergence_search import OutOfTime, Results, RunFailed, Search
from machine import processor, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
STEPS = 64
_QUICK_STEPS = 20
_LIBRARIES = ("torch", "transformers", "peft", "accelerate")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def in_a_process(setting: dict[str, Any], task: Task) -> dict[str, Any]:
    """One run, in a process of its own: no run's memory or random numbers reach another.

    Raises:
        RunFailed: with the last lines that it wrote.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        asked = {"setting": setting, "train": str(task.train), "held_out": str(task.held_out)}
        process = context.Process(target=run_into, args=(asked, out, log), daemon=True)
        process.start()
        process.join()
        if process.exitcode or not out.exists():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
            raise RunFailed("; ".join(said[-3:]) or f"exit code {process.exitcode}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def search(results: Results, folder: Path, hours: float, *, quick: bool) -> Search:
    tasks, base = tiny_tasks(folder) if quick else (real_tasks(folder), BASE)
    results.about = {
        "command": "python benchmarks/convergence.py" + (" --quick" if quick else ""),
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "versions": versions(_LIBRARIES),
        "base": "a random Llama" if quick else "SmolLM2-135M-Instruct",
        "tasks": {name: {"tokens a row": task.tokens, "digest": task.digest} for name, task in tasks.items()},
    }
    steps = _QUICK_STEPS if quick else STEPS
    return Search(tasks, base, steps, results, in_a_process, hours, say=partial(print, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=3.0, help="for all runs, of all starts together")
    parser.add_argument("--quick", action="store_true", help="tiny random models and few candidates")
    parser.add_argument("--report", action="store_true", help="run nothing: write the report of what is there")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/convergence.json")
    options = parser.parse_args()
    os.environ.update(_OFFLINE)
    from convergence_report import write_report
    from filelock import FileLock, Timeout

    from hyperion.models.cache import cache_dir

    folder = cache_dir() / "benchmark-convergence"
    folder.mkdir(parents=True, exist_ok=True)
    file = options.results or RESULTS / f"convergence{'-quick' if options.quick else ''}.json"
    try:
        with FileLock(folder / ".lock", timeout=0):
            results = Results(file)
            about = results.about
            found = search(results, folder, 0.0 if options.report else options.hours, quick=options.quick)
            results.about = about if options.report and about else results.about
            go_on(found, few=options.quick)
            results.write()
            write_report(found)
    except Timeout:
        sys.exit("another process runs this benchmark: their seconds would not be comparable")
    print(f"{len(results.runs)} runs, {found.spent / 3600:.2f} h; {file.with_suffix('.md')}")
    if found.failed:
        sys.exit("failed, and tried again next time: " + " | ".join(found.failed))


def go_on(found: Search, *, few: bool) -> None:
    """All stages, from what is measured already; ends early when the hours are over."""
    try:
        found.baseline()
        finalists = found.halve(CANDIDATES[:2] if few else CANDIDATES)
        found.repeat(finalists)
        found.timed()
    except OutOfTime:
        found.say("the hours are over: the report says what is missing; with more --hours it goes on")
    except RunFailed as error:
        found.failed.append(str(error))


if __name__ == "__main__":
    main()
