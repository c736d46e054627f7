from __future__ import annotations

from pathlib import Path

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
