"""A run that is killed, told to end, or stopped by its user goes on, and ends in the same bytes as one that was not.

`benchmarks/resume_stress.py` does this at every operation on the disk; here it is a sample of them, the same each time.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forking import forking_hyperion
from kill_points import Ended, Kill, Runs, survives, unlike, write_config

pytestmark = pytest.mark.slow
_RANDOM = random.Random(20261122)
SHARES = [_RANDOM.random() for _ in range(9)]


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed, and the server for those that are."""

    runs: Runs
    config: Path
    folder: Path
    ended: Ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, tiny_model)
    with Runs(folder) as runs:
        runs("train", config, "--output_dir", folder / "first", out=folder / "first")  # fills the caches
        ended = runs("train", config, "--output_dir", folder / "out", out=folder / "out")
        assert ended.code == 0, ended.output
        assert not unlike(folder / "first", folder / "out"), "two runs of one seed differ"
        yield Whole(runs, config, folder / "out", ended)


@pytest.mark.parametrize("share", SHARES[:3], ids="{:.3f}".format)
@pytest.mark.parametrize("cut", [False, True], ids=["", "cut"])
def test_killed_at_an_operation_on_the_disk(share: float, cut: bool, whole: Whole, tmp_path: Path) -> None:
    kill = Kill(operation=1 + int(share * whole.ended.operations), cut=cut)
    assert survives(whole.runs, whole.config, tmp_path / "out", whole.folder, [kill]) == []


@pytest.mark.parametrize("share", SHARES[3:6], ids="{:.3f}".format)
def test_killed_at_any_moment(share: float, whole: Whole, tmp_path: Path) -> None:
    kill = Kill(seconds=share * whole.ended.seconds)
    assert survives(whole.runs, whole.config, tmp_path / "out", whole.folder, [kill]) == []


def test_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    kills = [Kill(operation=int(40 + 60 * share)) for share in SHARES[6:]]
    assert survives(whole.runs, whole.config, tmp_path / "out", whole.folder, kills) == []


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_told_to_end_it_writes_a_checkpoint_and_says_how_to_go_on(
    signum: int, code: int, whole: Whole, tmp_path: Path, cli
) -> None:
    out = tmp_path / "out"
    ended, error = signalled(whole.config, out, signum, lambda: (out / "metrics.jsonl").exists())
    assert ended == code, error
    assert f"hyperion train {whole.config} --output_dir {out} --resume" in error
    assert "Traceback" not in error
    assert list(out.glob("checkpoint-*")), "no checkpoint was written"
    again = cli("train", whole.config, "--output_dir", out, "--resume")
    assert again.code == 0, again.stderr
    assert unlike(out, whole.folder) == []


def test_told_to_end_before_it_trains_it_leaves_nothing(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended, error = signalled(whole.config, out, signal.SIGTERM, out.exists)
    assert ended == 143, error
    assert "begin again" in error and "Traceback" not in error
    assert not out.exists()


def signalled(config: Path, out: Path, signum: int, when) -> tuple[int, str]:  # type: ignore[no-untyped-def]
    process = subprocess.Popen(
        [*forking_hyperion(), "train", str(config), "--output_dir", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not when():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signum)
    return process.wait(timeout=120), process.communicate()[1]
