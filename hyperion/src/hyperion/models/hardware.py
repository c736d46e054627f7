"""Which device, number format and memory a run will use: guessed without torch to plan, asked of torch to run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hyperion_core.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16")

_DEV = Path("/dev")
_NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# Instructions that multiply bfloat16 matrices; without them bfloat16 on a CPU is slower than float32.
_CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def plan_device() -> str:
    """The device that a run will likely use ("cuda", "mps" or "cpu"), without importing torch."""
    if visible_gpus() > 0 and not _torch_is_cpu_build():
        return "cuda"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    return "cpu"


def visible_gpus() -> int:
    """How many NVIDIA GPUs this process may use. `CUDA_VISIBLE_DEVICES` is honoured."""
    present = _present_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    count = 0
    # CUDA reads the list up to its first invalid entry.
    for entry in (part.strip() for part in chosen.split(",")):
        if not entry or entry.startswith("-") or (entry.isdigit() and int(entry) >= present):
            break
        count += 1
    return min(count, present)


def choose_dtype(requested: str, device: str) -> str:
    """The number format of the base weights: "float32", "bfloat16" or "float16".

    "auto" is bfloat16 on CUDA and on a CPU with bfloat16 instructions, float32 elsewhere.

    Raises:
        ModelError: `requested` is none of these.
    """
    if requested in DTYPES:
        return requested
    if requested != "auto":
        raise ModelError(
            f"unknown dtype {requested!r}",
            why="base weights are loaded as one of " + ", ".join(DTYPES),
            fix="write dtype: auto, or one of these names",
        )
    if device.startswith("cuda") or (device == "cpu" and _cpu_has_bf16()):
        return "bfloat16"
    return "float32"


def actual_device() -> str:
    """The device that torch can really use here: "cuda", "mps" or "cpu". Imports torch."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def _present_gpus() -> int:
    devices = [path for path in _DEV.glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", path.name)]
    if devices:
        return len(devices)
    if _NVIDIA_PROC.is_dir():
        return sum(1 for _ in _NVIDIA_PROC.iterdir())
    # Windows, and Linux under it, show no device files: ask the driver's own tool.
    if sys.platform == "win32" or (_DEV / "dxg").exists():
        return _count_with_nvidia_smi()
    return 0


def _count_with_nvidia_smi() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0  # a tool without a working driver: there is no GPU to use
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def _torch_is_cpu_build() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _cpu_has_bf16() -> bool:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return any(_CPU_BF16_FLAGS & set(line.split()) for line in lines)


def free_memory(device: str) -> int | None:
    """Bytes that a run could take; None where it cannot be told. On a CPU those of the machine, or of the cgroup
    (a container's, a job's, a service's) that this process is in, whichever are fewer."""
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        # what torch keeps of an earlier run, and gives to the next
        return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "cpu":
        import psutil

        return min([int(psutil.virtual_memory().available), *_free_in_cgroups()])
    return None


def _free_in_cgroups() -> list[int]:
    """Bytes that are left below each limit on this process: its cgroup's, and those of the cgroups around it."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            root, files = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1
            root, files = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        # a container sees its own cgroup as the root, whatever the path of it is outside
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and (left := _left_in(folder, *files)) is not None:
                found.append(left)
    return found


def _left_in(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """What of it is file cache that nobody has used of late is given back as soon as somebody asks for memory."""
    try:
        most, taken = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit, used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return None if most == "max" else max(0, int(most) - int(taken) + int(stat.get(cache, 0)))
    except (OSError, ValueError):  # a folder that is not there, or holds no limit, as the root of version 2
        return None
