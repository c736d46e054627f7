from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hyperion_core.errors import ModelError

from hyperion.models import hardware


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux machine without GPU; its /dev is the folder returned."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "_DEV", tmp_path)
    monkeypatch.setattr(hardware, "_NVIDIA_PROC", tmp_path / "gpus")
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")
    return tmp_path


def test_gpus_are_counted_as_cuda_would(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (hardware.plan_device(), hardware.visible_gpus()) == ("cpu", 0)
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (machine / name).touch()
    assert (hardware.plan_device(), hardware.visible_gpus()) == ("cuda", 3)
    for value, count in {"": 0, "-1": 0, "1": 1, "0, 2": 2, "0,7,1": 1, "GPU-aa,GPU-bb": 2}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert hardware.visible_gpus() == count, value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.plan_device() == "cpu"


def test_a_gpu_is_of_no_use_to_a_cpu_build_of_torch(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert hardware.plan_device() == "cuda"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert hardware.plan_device() == "cpu"


def test_windows_asks_the_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert hardware.visible_gpus() == 0
    tool = machine / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Big'\necho 'GPU 1: Big'\n")
    tool.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(tool))
    assert hardware.visible_gpus() == 2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert hardware.visible_gpus() == 0


def test_apple_silicon_is_mps_and_intel_macs_are_not(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert hardware.plan_device() == "cpu"
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert hardware.plan_device() == "mps"


def test_auto_dtype_is_bfloat16_where_it_is_fast(machine: Path) -> None:
    assert hardware.choose_dtype("auto", "cuda") == "bfloat16"
    assert hardware.choose_dtype("auto", "mps") == "float32"
    assert hardware.choose_dtype("auto", "cpu") == "float32"  # no cpuinfo
    for flags, expected in {
        "flags\t\t: fpu avx512f": "float32",
        "flags\t\t: fpu avx512_bf16": "bfloat16",
        "flags\t\t: amx_bf16 amx_tile": "bfloat16",
        "Features\t: asimd bf16 sve": "bfloat16",
        "model name\t: bf16 machine": "float32",
    }.items():
        (machine / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
        assert hardware.choose_dtype("auto", "cpu") == expected, flags
    assert hardware.choose_dtype("float16", "cpu") == "float16"
    with pytest.raises(ModelError, match="unknown dtype 'half'"):
        hardware.choose_dtype("half", "cpu")


def test_the_real_device_is_one_that_torch_can_use() -> None:
    import torch

    assert torch.ones(2, device=hardware.actual_device()).sum().item() == 2


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
CGROUPS = {
    "none": ("", {}, 1000),
    "no limit": ("0::/a", {"a": (V2, "max", 700, 0)}, 1000),
    "a container's": ("0::/", {"": (V2, 600, 500, 30)}, 130),
    "a larger one than is free": ("0::/", {"": (V2, 9000, 100, 0)}, 1000),
    "one around its own": ("0::/a/b", {"a": (V2, 600, 550, 0), "a/b": (V2, 600, 300, 0)}, 50),
    "used up": ("0::/", {"": (V2, 600, 610, 0)}, 0),
    "version 1": ("3:cpuset:/\n4:memory:/a\n0::/", {"memory/a": (V1, 600, 500, 40)}, 140),
    "version 1, unlimited": ("4:memory:/a", {"memory/a": (V1, 9223372036854771712, 500, 0)}, 1000),
    "version 1, its path is the host's": ("4:cpu,memory:/docker/0f", {"memory": (V1, 600, 500, 0)}, 100),
}


@pytest.mark.parametrize("own, groups, free", CGROUPS.values(), ids=CGROUPS)
def test_free_memory_is_that_of_the_container(own, groups, free, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", tmp_path / "own")
    if own:
        (tmp_path / "own").write_text(f"{own}\n")
    for folder, ((limit, used, cache), *figures) in groups.items():
        place = tmp_path / "cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / limit).write_text(f"{figures[0]}\n")
        (place / used).write_text(f"{figures[1]}\n")
        (place / "memory.stat").write_text(f"anon 5\n{cache} {figures[2]}\nactive_file 3\n")
    assert hardware.free_memory("cpu") == free
