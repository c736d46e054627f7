"""Kills a tiny training run at every operation on the disk, and at random moments, and resumes it.

    nox -s stress                        all of it; begun again, it goes on where it was
    python benchmarks/resume_stress.py --moments 100 --seed 1

A run counts as survived when the resumed one ends in the same bytes: adapter, metrics.jsonl, samples.jsonl, and the
last checkpoint's adapter, optimizer, schedule and random numbers. Results: benchmarks/results/resume-stress.json, and
a summary beside it. They are of one state of the code: those of another one are forgotten, and a run under which the
code changes ends.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import random
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from rich.progress import Progress

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
sys.path.insert(0, str(ROOT / "tests"))

from kill_points import Kill, Runs, survives, unlike, write_config  # noqa: E402

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


def kills_of(operations: int, seconds: float, moments: int, seed: int) -> list[Kill]:
    """At every operation; in the middle of every third file; at random moments of the run."""
    draw = random.Random(seed)
    return [
        *(Kill(operation=number) for number in range(1, operations + 1)),
        *(Kill(operation=number, cut=True) for number in range(2, operations + 1, 3)),
        *(Kill(seconds=round(draw.uniform(0, seconds), 3)) for _ in range(moments)),
    ]


def code() -> str:
    """A hash of the sources that a run is made of."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("hyperion*/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=60, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of these moments")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    options = parser.parse_args()
    from hyperion_core.testing.tiny import save_tiny_base

    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "resume-stress.json"
    begun = code()
    before = {} if options.fresh or not file.exists() else json.loads(file.read_text(encoding="utf-8"))
    known = before["kills"] if before.get("code") == begun else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_base(folder / "base")
        config = write_config(folder, folder / "base")
        with Runs(folder) as runs, Progress() as progress:
            runs("train", config, "--output_dir", folder / "first", out=folder / "first")
            whole = runs("train", config, "--output_dir", folder / "whole", out=folder / "whole")
            if unlike(folder / "first", folder / "whole"):
                sys.exit("two runs of one seed differ: resume cannot be judged on this machine")
            kills = kills_of(whole.operations, whole.seconds, options.moments, options.seed)
            for kill in progress.track(kills, description="killed and resumed"):
                if str(kill) in known:
                    continue
                found = survives(runs, config, folder / "killed", folder / "whole", [kill])
                shutil.rmtree(folder / "killed", ignore_errors=True)
                if code() != begun:
                    sys.exit("the code was changed meanwhile: what was found says nothing; begin again")
                known[str(kill)] = found
                write(file, known, whole.operations, begun)
    failed = {kill: unlike for kill, unlike in known.items() if unlike}
    for kill, files in failed.items():
        print(f"NOT THE SAME: killed {kill}: {', '.join(files)}")
    print(f"{len(known) - len(failed)} of {len(known)} kills survived to the bit; {file}")
    sys.exit(bool(failed))


def write(file: Path, kills: dict[str, list[str]], operations: int, code: str) -> None:
    versions = {name: version(name) for name in _LIBRARIES}
    content = {
        "command": "nox -s stress",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "versions": {"python": platform.python_version(), **versions},
        "code": code,
        "operations": operations,
        "kills": kills,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    kinds = {
        "at an operation on the disk": [k for k in kills if k.startswith("operation") and "cut" not in k],
        "in the middle of writing a file": [k for k in kills if "cut" in k],
        "at a random moment (SIGKILL)": [k for k in kills if k.startswith("after")],
    }
    lines = [
        "# Killed and resumed", "",
        f"`nox -s stress`, {content['date']}, {content['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in content["versions"].items()) + ".", "",
        f"A tiny run (3 epochs, accumulation, dropout, evaluations, rotation) makes {operations} changes on the disk. "
        "It was killed, resumed, and compared with one that was not: adapter, `metrics.jsonl`, `samples.jsonl`, and "
        "the last checkpoint's adapter, optimizer, schedule, random numbers and trainer state.", "",
        "| killed | times | the same bytes |", "| --- | --- | --- |",
        *(f"| {kind} | {len(names)} | {sum(not kills[name] for name in names)} |" for kind, names in kinds.items()),
    ]  # fmt: skip
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
