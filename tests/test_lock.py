"""`hyperion lock` records what a run stands on; `train --locked` refuses a drift and names it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hyperion_core.artifact import sha256
from hyperion_core.context import NoProgress
from hyperion_core.errors import ArtifactError, ModelError
from hyperion_core.testing.tiny import save_tiny_base

from hyperion.config import FinetuneConfig
from hyperion.lock import gather_for, read_lock, write_lock
from hyperion.planning import make_plan


@pytest.fixture
def config(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    save_tiny_base(base)
    rows = [{"prompt": f"{n} squared is", "completion": f" {n * n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "base_model": "./base", "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj"]},
                "dataset": {"dataset": "rows.jsonl", "validation_split": 2},
                "training": {"max_steps": 1, "use_cpu": True},
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    return path


def test_what_has_not_changed_is_trained_and_the_run_keeps_its_lock(config: Path, cli) -> None:
    locked = cli("lock", config)
    assert locked.code == 0, locked.stderr
    first = (config.parent / "hyperion.lock").read_text(encoding="utf-8")
    assert str(config.parent) not in first, "a path of the machine is in the lock"

    done = cli("train", config, "--locked", "--output_dir", "out")
    assert done.code == 0, done.stderr
    own = json.loads((config.parent / "out" / "hyperion.lock").read_text(encoding="utf-8"))
    assert own == json.loads(first), "the run locked something else than `hyperion lock`"
    again = cli("train", config, "--lock-file", "out/hyperion.lock", "--output_dir", "again")
    assert again.code == 0, again.stderr


def test_every_drift_is_refused_and_named(config: Path, cli) -> None:
    assert cli("lock", config).code == 0
    folder = config.parent
    lock = json.loads((folder / "hyperion.lock").read_text(encoding="utf-8"))
    lock["runs"]["config.json"]["libraries"]["peft"] = "0.0.1"
    lock["runs"]["config.json"]["plugins"]["hyperion-peft"] = "0.1.0, source 00"
    (folder / "hyperion.lock").write_text(json.dumps(lock), encoding="utf-8")
    weights = bytearray((folder / "base" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "base" / "model.safetensors").write_bytes(weights)
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(rows.replace("49", "50"), encoding="utf-8")

    done = cli("train", config, "--locked", "--output_dir", "out")
    assert done.code == 2
    for named in (
        "libraries peft: 0.0.1 in the lock",
        "plugins hyperion-peft: 0.1.0, source 00 in the lock",
        "model model.safetensors:",
        "data rows.jsonl:",
        "python -m pip install peft==0.0.1",
    ):
        assert named in done.stderr, done.stderr
    assert "config.json:" not in done.stderr and "tokenizer.json" not in done.stderr, "something unchanged is named"
    assert not (folder / "out").exists(), "something was written although the run was refused"


def test_the_base_is_hashed_once_in_a_process_and_again_once_it_has_changed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def counting(path: Path, *progress: Callable[[int], None]) -> str:
        hashed.append(path.name)
        return sha256(path, *progress)

    monkeypatch.setattr("hyperion.lock.sha256", counting)
    planned = make_plan(FinetuneConfig.from_file(config))
    first = gather_for(planned, NoProgress())["model"]
    assert sorted(hashed) == sorted(set(first) - {"name"})
    hashed.clear()
    assert gather_for(planned, NoProgress())["model"] == first and not hashed
    weights = config.parent / "base" / "model.safetensors"
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times does
    assert gather_for(planned, NoProgress())["model"]["model.safetensors"] == sha256(weights)
    assert hashed == ["model.safetensors"]


def test_a_lock_that_does_not_know_the_run_is_named(config: Path, cli) -> None:
    done = cli("train", config, "--locked")
    assert done.code == 2 and "hyperion lock config.json" in done.stderr, done.stderr
    assert cli("lock", config).code == 0
    other = config.rename(config.with_name("other.json"))
    done = cli("train", other, "--locked")
    assert done.code == 2 and "it holds config.json" in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "runs": {}}', '{"format": 1, "runs": {"config.json": 3}}'])
def test_a_damaged_lock_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    lock = tmp_path / "hyperion.lock"
    lock.write_text(text, encoding="utf-8")
    for use in (lambda: read_lock(lock, "config.json"), lambda: write_lock(lock, "config.json", {})):
        with pytest.raises(ArtifactError, match=r"hyperion\.lock") as caught:
            use()
        assert caught.value.why and caught.value.fix
    assert lock.read_text(encoding="utf-8") == text


def test_a_hub_model_is_locked_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from hyperion.models.hub_commit import hub_commit
    from hyperion.models.source import BaseModelSource

    commit = "a" * 40
    asked = []

    def answer(self: object, name: str, revision: str | None, timeout: float) -> object:
        asked.append((name, revision))
        return type("Info", (), {"sha": commit})()

    def no_network(self: object, name: str, revision: str | None, timeout: float) -> object:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    assert hub_commit(BaseModelSource("acme/base", "hub", None, "main")) == commit
    assert asked == [("acme/base", "main")]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    assert hub_commit(BaseModelSource("acme/base", "hub", tmp_path / commit, None)) == commit
    with pytest.raises(ModelError, match="which commit of acme/base") as caught:
        hub_commit(BaseModelSource("acme/base", "hub", None, None))
    assert "no network" in caught.value.why
