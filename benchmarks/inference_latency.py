"""A tuned model in the forms in which it can answer: latency, bytes on disk, quality. On the real SmolLM2-135M, a CPU.

    nox -s bench -- inference_latency                           everything; begun again, it goes on where it was
    python benchmarks/inference_latency.py --only merged        the arms whose names have that in them
    python benchmarks/inference_latency.py --rounds 9           more rounds; those that are measured are kept

SmolLM2-135M-Instruct is tuned with LoRA (r 16 on q and v, 60 steps) on real instructions, merged, and quantized, once.
Then all arms are measured in turn, round after round, each in a process of its own: milliseconds a token at batch 1,
64 tokens of prompt and 64 new ones, greedy; and until the first token. Ratios are taken within a round, so that what
else the machine does hits both. Quality is on held-out answers, against the merged model; of the weights, in float32.

Nothing else should run meanwhile. Results are in benchmarks/results/inference-latency.json, .md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from machine import processor, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
_LIBRARIES = ("torch", "transformers", "peft", "gptqmodel", "torchao", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="an arm, or a part of names; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="of latency; 0 measures disk and quality alone")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--held-out", type=int, default=100, help="chats that quality is measured on")
    parser.add_argument("--folder", type=Path, help="for text and models; default: beside Hyperion's other caches")
    parser.add_argument("--results", type=Path, default=RESULTS / "inference-latency.json", help="the file of results")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured; the models are kept")
    parser.add_argument("--measure", choices=("latency", "quality"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch
    from adaptive_bits_measures import cache_dir, quiet_libraries
    from inference_latency_arms import ARMS, TunedBench, latency

    torch.set_num_threads(options.threads)
    folder = options.folder or cache_dir() / "benchmark-inference-latency"
    folder.mkdir(parents=True, exist_ok=True)
    bench = TunedBench(folder, rows=128, max_length=256, held_out=options.held_out)
    if options.measure:
        with quiet_libraries():
            (name,) = options.only
            found = latency(bench, name) if options.measure == "latency" else bench.quality(bench.load(name, "float32"))
        print(json.dumps(found))
        return
    wanted = [part if part in ARMS else f"*{part}*" for part in options.only]
    chosen = [name for name in ARMS if not wanted or any(fnmatchcase(name, one) for one in wanted)]
    settings = {"threads": options.threads, "held_out": options.held_out}
    results = _Results(options.results, settings, fresh=options.fresh)
    failed: dict[str, str] = {}
    for name in chosen:
        if "quality" not in results.of(name):
            print(f"{name}: quality …", flush=True)
            try:
                with quiet_libraries():
                    disk = bench.disk(name)
                results.add(name, disk=disk, quality=_quality(options, name, results), tokens=bench.answers)
            except Exception as error:  # the other arms are measured all the same
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"  FAILED: {failed[name]}", flush=True)
    for number in range(options.rounds):
        for name in (name for name in chosen if name not in failed):
            rounds = results.of(name).get("rounds", {})
            if str(number) in rounds:
                continue
            try:
                found = _measured(options, name, "latency")
            except RuntimeError as error:
                failed[name] = str(error)
                print(f"  {name} FAILED: {error}", flush=True)
                continue
            print(f"round {number}, {name}: {found['token']:.1f} ms a token", flush=True)
            results.add(name, rounds={**rounds, str(number): found})
    print(f"{options.results.with_suffix('.md')}")
    if failed:
        sys.exit("failed: " + ", ".join(failed))


def _quality(options: argparse.Namespace, name: str, results: _Results) -> dict[str, Any]:
    from inference_latency_arms import ARMS

    same = (results.of(other).get("quality") for other in ARMS if ARMS[other].weights == ARMS[name].weights)
    return next((found for found in same if found), None) or _measured(options, name, "quality")


def _measured(options: argparse.Namespace, name: str, what: str) -> dict[str, Any]:
    """In a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, __file__, "--measure", what, "--only", name, "--threads", str(options.threads),
               "--held-out", str(options.held_out)]  # fmt: skip
    command += ["--folder", str(options.folder)] if options.folder else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class _Results:
    """The file of results, written after each measurement, and the page and plot beside it."""

    def __init__(self, file: Path, settings: dict[str, Any], *, fresh: bool) -> None:
        self.file, self.settings = file, settings
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not fresh else {}
        if found and found["settings"] != settings:
            sys.exit(f"{file} was measured with {found['settings']}: give --results another name, or --fresh")
        self.arms: dict[str, dict[str, Any]] = found.get("arms", {})
        self.notes: list[str] = found.get("notes", [])  # by hand: what else was looked at, for the page

    def of(self, name: str) -> dict[str, Any]:
        return self.arms.get(name, {})

    def add(self, name: str, **more: Any) -> None:
        from inference_latency_arms import ARMS
        from inference_latency_report import write_report

        self.arms[name] = {**self.of(name), **more}
        content = {
            "command": "python benchmarks/inference_latency.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{processor()}, {self.settings['threads']} threads",
            "versions": versions(_LIBRARIES),
            "settings": self.settings,
            "notes": self.notes,
            "arms": {name: self.arms[name] for name in ARMS if name in self.arms},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f".{self.file.name}.partial")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.file)
        write_report(self.file)


if __name__ == "__main__":
    main()
