"""What a quantizer has made offline comes into the cache whole, wherever in its folder the plugin put it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hyperion_core.config import QuantizationConfig
from hyperion_core.facts import BitPlan
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Quantizer
from hyperion_core.testing.tiny import save_tiny_base

from hyperion.quantization.prepared import prepared


class Offline(Quantizer):
    """Makes a file, in the folder that it was given or below it."""

    config_class = QuantizationConfig
    below: ClassVar[str] = ""
    killed: ClassVar[bool] = False

    def quantizer_prepare(self, folder: Path, **_: Any) -> Path:
        made = (folder / self.below).resolve()
        made.mkdir(exist_ok=True)
        (made / "model.safetensors").write_bytes(b"made")
        if self.killed:
            raise KeyboardInterrupt
        return made


def make(plugin: Quantizer, base: Path, cache: Path) -> Path:
    hooks = RunHooks()
    hooks.add(plugin, "offline")
    config, ctx = QuantizationConfig(method="offline", bits=4), SimpleNamespace(cache=cache, device="cpu")
    return prepared(base, plugin, hooks.quantizer("offline"), config, BitPlan(4, 0), ctx)  # type: ignore[arg-type]


@pytest.mark.parametrize("below", ["", "model"])
def test_what_is_made_is_kept(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a subfolder, and where the cache is behind a link that the plugin has followed."""
    monkeypatch.setattr(Offline, "below", below)
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    found = make(Offline(), save_tiny_base(tmp_path / "base"), tmp_path / "cache")
    assert (found / "model.safetensors").read_bytes() == b"made"


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, quantized = save_tiny_base(tmp_path / "base"), tmp_path / "cache/quantized"
    monkeypatch.setattr("hyperion.quantization.prepared.shutil.rmtree", lambda *_, **__: None)  # as a kill leaves it
    monkeypatch.setattr(Offline, "killed", True)
    with pytest.raises(KeyboardInterrupt):
        make(Offline(), base, tmp_path / "cache")
    monkeypatch.undo()
    assert len([path for path in quantized.iterdir() if path.is_dir()]) == 1
    found = make(Offline(), base, tmp_path / "cache")
    assert [path for path in quantized.iterdir() if path.is_dir()] == [found]
