"""What a benchmark ran on, as its page tells it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """What its maker calls it, which of its instructions torch uses, and the cores that there are; the GPU before all,
    where there is one."""
    import torch

    from hyperion.models.hardware import choose_dtype

    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    bf16 = ", bfloat16 products" if choose_dtype("auto", "cpu") == "bfloat16" else ", no bfloat16 products"
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{named or platform.processor() or platform.machine()} ({capability}{bf16}), {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def peak_bytes() -> int:
    """The most memory that this process has held: of the GPU, where it computes on one, by torch's tensors."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of Python, and of those of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
