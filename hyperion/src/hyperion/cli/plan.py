"""`hyperion plan`: settings of a run that fit into so much memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.candidate import Candidate
    from hyperion.optimization.search import Found

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
          "tib": 2**40}  # fmt: skip
_TARGETS = ("speed", "balanced", "quality")
_DEVICES = ("cpu", "cuda", "mps")


def plan(
    config: Path = typer.Argument(help="YAML or JSON file of the run."),
    memory: str = typer.Option(..., "--memory", help="Of the device: 24GB, 800MiB."),
    target: str = typer.Option("balanced", "--target", help="speed, balanced or quality."),
    device: str = typer.Option(None, "--device", help="cpu, cuda or mps; by default what is here."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Find the settings that fit into so much memory; loads no weights. Times are estimates for this machine."""
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import search

    size = size_in_bytes(memory)
    _one_of("--target", target, _TARGETS)
    asked = FinetuneConfig.from_file(config)
    device = device or asked.training.likely_device()
    _one_of("--device", device, _DEVICES)
    found = search(asked, size, device, target)  # type: ignore[arg-type]
    rate = _rate(found.chosen, device)
    if as_json:
        from .json_output import print_json

        rows = [_as_data(each, asked, rate) for each in found.alternatives]
        print_json({"memory": size, "device": device, "chosen": rows[0], "alternatives": rows[1:]}, ensure_ascii=False)
        return
    _show(found, asked, rate)


def size_in_bytes(text: str) -> int:
    """ "24GB", "800MiB".

    Raises:
        UsageError: it is no size.
    """
    from .usage import UsageError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower(), flags=re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS and len(match[1]) < 20 else 0
    if size <= 0:
        raise UsageError(f"--memory {text} is no size of a memory", why="it is a number above 0 and a unit",
                         fix="--memory 24GB, or --memory 800MiB")  # fmt: skip
    return size


def _one_of(option: str, value: str, names: tuple[str, ...]) -> None:
    from .usage import UsageError

    if value not in names:
        raise UsageError(
            f"{option} {value} is unknown", why=f"it is one of {', '.join(names)}", fix=f"{option} {names[0]}"
        )


def _rate(chosen: Candidate, device: str) -> float | None:
    """Operations a second here; None where the plan is for a device that is not here."""
    from hyperion.models.cache import cache_dir
    from hyperion.models.hardware import actual_device
    from hyperion.optimization.time_model import measured_rate

    if device != "cpu" and actual_device() != device:
        return None
    return measured_rate(chosen.width, chosen.step.dtype, device, cache_dir())


def _seconds(candidate: Candidate, rate: float | None) -> float | None:
    from hyperion.optimization.time_model import step_seconds

    return None if rate is None else step_seconds(candidate.operations, rate)


def _as_data(candidate: Candidate, asked: FinetuneConfig, rate: float | None) -> dict[str, Any]:
    return {
        "quantization": {"method": candidate.method or None, "bits": candidate.bits},
        "rank": candidate.rank,
        "tokens_a_pass": candidate.step.tokens,
        "layers_computed_again": candidate.step.checkpointed,
        "memory": candidate.memory,
        "process": candidate.process,
        "total": candidate.peak + candidate.process,
        "seconds_a_step_estimated": _seconds(candidate, rate),
        "config": candidate.lines(asked),
    }


def _show(found: Found, asked: FinetuneConfig, rate: float | None) -> None:
    import yaml
    from hyperion_core.facts import MiB
    from rich.table import Table
    from rich.text import Text

    from .console import out

    named = [f"{part}, MiB" for part in found.chosen.memory]
    table = Table("", "base held", "rank", "tokens a pass", "layers computed again", *named,
                  "process", "total", "s a step (estimate)", box=None, pad_edge=False)  # fmt: skip
    for each in found.alternatives:
        seconds = _seconds(each, rate)
        cells = [
            "→" if each is found.chosen else "",
            f"{each.method}, {each.bits} bits" if each.method else "not quantized",
            str(each.rank or "-"),
            str(each.step.tokens),
            str(each.step.checkpointed),
            *(f"{size / MiB:,.0f}" for size in (*each.memory.values(), each.process, each.peak + each.process)),
            "-" if seconds is None else f"{seconds:,.2f}",
        ]
        table.add_row(*map(Text, cells), style="bold" if each is found.chosen else "")
    console = out()
    console.print(table)
    console.print(Text("\nFor the config:", style="green"))
    console.print(Text(yaml.safe_dump(found.chosen.lines(asked), sort_keys=False).rstrip()))
