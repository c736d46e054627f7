"""What a row measures of itself while it runs, kept in a file beside the run: an interrupted row goes on counting."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import read_json, write_json
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Observer
from hyperion_core.registry import registry

from ..quantization.resident import base_bytes

if TYPE_CHECKING:
    from hyperion_core.context import RunContext
    from torch.nn import Module

MEASURED = "measured.json"


class BaseSize(Observer):
    """Writes how many bytes the base takes in memory, once it is loaded, quantized, and has its adapter."""

    def run_model_ready(self, model: Module, ctx: RunContext) -> None:
        quantization = ctx.plan.config.get("quantization")
        quantizer = None
        if quantization:
            hooks, method = RunHooks(), str(quantization["method"])
            hooks.add(registry().create("quantizer", method), method)
            quantizer = hooks.quantizer(method)
        keep(ctx.output.parent, base_bytes=base_bytes(model, quantizer))


def read_measured(folder: Path) -> dict[str, Any]:
    """What is known so far of the row in `folder`."""
    return read_json(folder / MEASURED) if (folder / MEASURED).is_file() else {}


def keep(folder: Path, **figures: Any) -> None:
    write_json(folder / MEASURED, {**read_measured(folder), **figures})


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Inside, the row runs: its seconds add up over interruptions, of its memory the peak is kept."""
    started, before = time.monotonic(), read_measured(folder)
    try:
        yield
    finally:
        keep(
            folder,
            seconds=round(before.get("seconds", 0.0) + time.monotonic() - started, 2),
            peak_memory=max(before.get("peak_memory", 0), peak_memory()),
        )


def peak_memory() -> int:
    """The most bytes at once: of the GPU where there is one, else of this process."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
    try:  # unlike getrusage's, this one has nothing of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import psutil  # type: ignore[import-untyped,unused-ignore]

        on_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
        if on_windows is not None:
            return int(on_windows)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
