"""Training runs that are killed at a chosen moment: what the tests and `benchmarks/resume_stress.py` share.

Run as a script it is a server: it imports everything heavy once, and forks a child for each run that it is asked for,
so that a run costs a second. A child is killed in one of two ways, of which neither lets it clean up:

- at an operation on the disk: Python tells an audit hook (PEP 578) of every file that is opened to be written, renamed
  or removed; the child counts those below its output folder and ends at the n-th with `os._exit`, before it is done.
  `cut` leaves half of what was written to the file that was opened last, as if the rest were still to come;
- after some seconds: SIGKILL, wherever it is then, native code included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TIMES = ("runtime", "seconds", "_per_second")
_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@dataclass(frozen=True)
class Kill:
    """When a run dies: at the `operation`-th change on the disk (from 1), or after `seconds`; never, if neither."""

    operation: int | None = None
    cut: bool = False
    seconds: float | None = None

    def __str__(self) -> str:
        if self.operation is None:
            return f"after {self.seconds:.3f} s"
        return f"operation {self.operation}{', file cut in half' if self.cut else ''}"


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (-9 when it was killed), operations on the disk, seconds, and what it printed."""

    code: int
    operations: int
    seconds: float
    output: str


class Runs:
    """A context manager: the server, and runs of `hyperion` with the given arguments through it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Runs:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._folder,
            env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def __call__(self, *arguments: str | Path, out: Path, kill: Kill | None = None) -> Ended:
        assert self._server.stdin is not None and self._server.stdout is not None
        job = {"arguments": [*map(str, arguments)], "out": str(out), "kill": asdict(kill or Kill())}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def write_config(folder: Path, base: Path) -> Path:
    """A run with all that could go wrong in it: epochs whose last step is short, accumulation, dropout, noise,
    evaluations with samples that do not meet the checkpoints, rotation, and the best model at the end."""
    rows = [{"prompt": f"{'count ' * (n % 5)}{n} is", "completion": f" {n * n}"} for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "base_model": str(base),
        "dtype": "float32",
        "adapter": {"type": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "dataset": {"dataset": "rows.jsonl", "validation_split": 4},
        "training": {
            "num_train_epochs": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "use_cpu": True,
            "learning_rate": 5e-3, "eval_steps": 3, "save_steps": 4, "logging_steps": 1, "eval_samples": 1,
            "eval_samples_max_new_tokens": 3, "neftune_noise_alpha": 2.0, "weight_decay": 0.01, "save_total_limit": 2,
        },
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def survives(runs: Runs, config: Path, out: Path, whole: Path, kills: Sequence[Kill]) -> list[str]:
    """Train into `out`, killed and resumed again and again, then to the end; gives what is unlike the `whole` run."""
    for kill in (*kills, None):
        begun = any(out.glob("checkpoint-*")) or any(out.glob(".checkpoint-*.old"))
        ended = runs("train", config, "--output_dir", out, *(["--resume"] if begun else []), out=out, kill=kill)
        if begun and ended.code == 2 and "begin again in the same folder" in ended.output:  # none was complete
            ended = runs("train", config, "--output_dir", out, out=out, kill=kill)
        if (out / "hyperion.json").exists():
            break
        if kill is None or ended.code not in (-signal.SIGKILL, 0):
            return [f"exit code {ended.code}: {ended.output[-2000:]}"]
    return unlike(out, whole)


def unlike(out: Path, whole: Path) -> list[str]:
    """Files of two finished runs that are not the same bytes: adapter, figures, samples, and the last checkpoint's
    adapter, optimizer, schedule, random numbers and, but for times and places, the trainer's state."""
    names = ["adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"]
    last = max(whole.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])).name
    names += [f"{last}/{name}" for name in (*_STATE, "adapter/adapter_model.safetensors", "trainer_state.json")]
    return [name for name in names if not (out / name).exists() or _content(out / name) != _content(whole / name)]


def _content(path: Path) -> Any:
    if path.name != "trainer_state.json":
        return path.read_bytes()
    state = json.loads(path.read_text(encoding="utf-8"))
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
    state["log_history"] = [
        {name: value for name, value in line.items() if not name.endswith(_TIMES)} for line in state["log_history"]
    ]
    return state


# --- the server ---


def serve() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401

    import hyperion.data.tokenization
    import hyperion.engine.fit
    import hyperion.models.load  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(asdict(_run(job["arguments"], Path(job["out"]), Kill(**job["kill"])))), flush=True)


def _run(arguments: list[str], out: Path, kill: Kill) -> Ended:
    log, count = out.with_name(f"{out.name}.log"), out.with_name(f"{out.name}.count")
    count.unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_a_run(arguments, out, kill, log, count)
    if kill.seconds is not None:
        while time.monotonic() - start < kill.seconds and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:  # it ended before its time came
        code = 0
    operations = int(count.read_text()) if count.exists() else 0
    code = -signal.SIGKILL if code == 99 else code
    return Ended(code, operations, time.monotonic() - start, log.read_text(encoding="utf-8", errors="replace"))


def _become_a_run(arguments: list[str], out: Path, kill: Kill, log: Path, count: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    seen = 0
    opened: list[tuple[str, int]] = []  # paths, and the bytes that were there before
    prefix = str(out) + os.sep

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            if not isinstance(given[2], int) or not given[2] & _WRITING:
                return
        elif event not in _CHANGES:
            return
        path = given[0]
        if not isinstance(path, str) or not path.startswith(prefix):
            return
        seen += 1
        if seen == kill.operation:
            if kill.cut and opened and os.path.isfile(opened[-1][0]):
                file, before = opened[-1]
                os.truncate(file, before + max(os.path.getsize(file) - before, 0) // 2)
            os._exit(99)
        if event == "open":
            kept = os.path.isfile(path) and not given[2] & os.O_TRUNC
            opened.append((path, os.path.getsize(path) if kept else 0))

    from hyperion.cli.main import run

    sys.argv = ["hyperion", *arguments]
    sys.addaudithook(watch)
    code: Any = 0
    try:
        run()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    counted = seen
    count.write_text(str(counted))
    os._exit(int(code))


if __name__ == "__main__":
    serve()
