"""One row of a grid, in a process of its own: trains, measures, and leaves result.json.

A row's folder:

    run/            the run: its checkpoints, its artifact
    measured.json   what the row measured of itself so far
    result.json     its figures, or its error; written last
    log.txt         all that it printed
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from hyperion_core.artifact import MANIFEST, Artifact, read_json, write_json
from hyperion_core.errors import HyperionError
from hyperion_core.registry import registry
from hyperion_core.secrets import RedactedStream

from .. import __version__
from ..lock import LOCK
from ..monitoring.metrics import MetricsFile
from ..output import DATA
from .grid import Values, one_line, row_config
from .measured import BaseSize, read_measured, timed

RUN, RESULT, LOG = "run", "result.json", "log.txt"
_OBSERVER = "base-size"
_LARGEST_EXPONENT = 700.0  # beyond it a perplexity is no float any more


def main() -> None:
    """`sys.argv[1]` is JSON: config (a path), values, folder. Standard input stays open as long as the grid runs."""
    from ..engine.interruption import terminate

    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=_end_with_the_grid, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("hyperion").setLevel(logging.INFO)
    asked = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    try:
        result = run_row(asked["config"], asked["values"], folder)
    except KeyboardInterrupt:  # the grid was stopped: the row goes on from here another time
        sys.exit(128 + signal.SIGINT)
    except HyperionError as error:
        print(error, file=sys.stderr)
        result = {"state": "failed", "error": one_line(error)}
    except Exception as error:
        traceback.print_exc()
        message = str(error).partition("\n")[0]
        result = {"state": "failed", "error": f"{type(error).__name__}: {message}"}
    write_json(folder / RESULT, result)


def run_row(config_file: str | Path, values: Values, folder: Path) -> dict[str, Any]:
    """Train, go on, or only read what a finished run left; gives the row's figures.

    Raises:
        HyperionError: the run cannot start or go on.
    """
    run = folder / RUN
    if not (run / MANIFEST).is_file():
        _train(config_file, values, folder)
    return figures(folder)


def figures(folder: Path) -> dict[str, Any]:
    """Of a row whose run is finished. Perplexities are of the supervised tokens of the evaluation data; `before` is
    measured before the first step, when the adapter does not change anything yet."""
    run = folder / RUN
    artifact, measured = Artifact.read(run), read_measured(folder)
    lines = MetricsFile(run / "metrics.jsonl").read()
    times = MetricsFile(run / "timing.jsonl").read()
    first = next((line["eval_loss"] for line in lines if line["step"] == 0 and line.get("eval_loss") is not None), None)
    tokens = next((line["tokens"] for line in reversed(lines) if "tokens" in line), 0)
    seconds = next((line["seconds"] for line in reversed(times) if "seconds" in line), 0.0)
    return {
        "state": "done",
        "base_bytes": measured.get("base_bytes"),
        "perplexity_before": _perplexity(first),
        "perplexity_after": _perplexity(artifact.metrics.get("eval_loss")),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory": measured.get("peak_memory"),
        "seconds": measured.get("seconds"),
        "evaluation_data": read_json(run / DATA).get("evaluation"),
        **_stood_on(run),
    }


def _stood_on(run: Path) -> dict[str, Any]:
    """What has to be the same in two rows that are compared, as the run's lock names it."""
    locked = next(iter(read_json(run / LOCK)["runs"].values()))  # two, where the config was renamed on the way
    return {
        "base": hashlib.sha256(json.dumps(locked["model"], sort_keys=True).encode()).hexdigest(),
        "data": locked["data"].get("fingerprint"),
        "versions": {**locked["plugins"], **locked["libraries"]},
    }


def _train(config_file: str | Path, values: Values, folder: Path) -> None:
    from ..engine.checkpoints import latest_checkpoint
    from ..pipeline import run

    registry().add(BaseSize, _OBSERVER, distribution="hyperion-ft", version=__version__)
    config = row_config(config_file, values)
    config = config.replace(plugins=[*config.plugins, _OBSERVER])
    checkpoint = latest_checkpoint(folder / RUN)
    if checkpoint is None:  # it was killed before its first one, or after the last step of a run that keeps none
        shutil.rmtree(folder / RUN, ignore_errors=True)
    with timed(folder):
        run(config, output_dir=folder / RUN, resume=checkpoint is not None)


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, _LARGEST_EXPONENT))


def _end_with_the_grid() -> None:
    """The grid closes its end of the pipe to ask for a checkpoint and the end, and also when it dies."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
