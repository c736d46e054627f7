"""A run's folder: its alone, never half-written before it trains, and honest about what a resumed run found changed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hyperion_core.artifact import write_json
from hyperion_core.errors import TrainingError
from hyperion_core.plan import Plan

from hyperion.output import claim_output, output_folder

PLAN = Plan(config={"training": {"learning_rate": 1e-3}}, choices=(), device="cpu", dtype="float32",
            versions={"torch": "2.13.0"})  # fmt: skip


def checkpoint_in(folder: Path, step: int = 4) -> Path:
    from hyperion.engine.checkpoints import writing_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    with writing_checkpoint(folder, step) as inside:
        (inside / "optimizer.pt").write_text("x")
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_never_share_a_folder(resume: bool, tmp_path: Path) -> None:
    if resume:
        checkpoint_in(tmp_path / "out")
    code = f"""if True:
        from pathlib import Path
        from hyperion.output import output_folder
        with output_folder(Path({str(tmp_path / "out")!r}), resume={resume}):
            pass
    """
    with output_folder(tmp_path / "out", resume=resume):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another run is writing into" in other.stderr, other.stderr
    with output_folder(tmp_path / "out", resume=resume):
        pass  # the first one has let go


def test_a_lock_that_a_killed_run_left_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.in-use.lock").touch()
    with output_folder(tmp_path / "out", resume=False) as (folder, checkpoint):
        assert checkpoint is None
    assert list(folder.iterdir()) == []


def test_half_a_plan_that_a_killed_run_left_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.partial").write_text("{")
    with output_folder(tmp_path, resume=False) as (folder, _):
        claim_output(folder, PLAN, None)
    assert (tmp_path / "plan.json").exists()


def test_a_checkpoint_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    checkpoint_in(tmp_path).rename(tmp_path / ".checkpoint-4.old")
    (tmp_path / ".checkpoint-4.partial").mkdir()
    with output_folder(tmp_path, resume=True) as (folder, checkpoint):
        assert checkpoint == folder / "checkpoint-4"


def test_another_version_is_allowed_said_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = checkpoint_in(tmp_path)
    write_json(tmp_path / "plan.json", PLAN.to_dict())
    claim_output(tmp_path, replace(PLAN, versions={"torch": "2.14.0"}), checkpoint)
    assert "torch was 2.13.0 when this run began and is 2.14.0 now" in caplog.text
    line = json.loads((tmp_path / "resumed.jsonl").read_text())
    assert line == {"checkpoint": "checkpoint-4", "versions": {"torch": ["2.13.0", "2.14.0"]}, "config": []}


def test_another_config_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path)
    write_json(tmp_path / "plan.json", PLAN.to_dict())
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(TrainingError) as caught:
        claim_output(tmp_path, replace(PLAN, config={"training": {"learning_rate": 1e-4}}), checkpoint)
    assert caught.value.why == "training.learning_rate: 0.001 then, 0.0001 now"
    assert (tmp_path / "plan.json").read_bytes() == before and not (tmp_path / "resumed.jsonl").exists()


def test_resume_of_what_never_got_to_a_checkpoint_says_to_begin_again(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / ".checkpoint-4.partial").mkdir()
    with pytest.raises(TrainingError, match="no complete checkpoint") as caught, output_folder(tmp_path, resume=True):
        pytest.fail("there is nothing to resume")
    assert caught.value.fix == "begin again in the same folder, without --resume"
    with output_folder(tmp_path, resume=False) as (_, checkpoint):
        assert checkpoint is None
