"""The search of `benchmarks/convergence.py`: what it measures, what it takes for the best, and that it goes on."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from convergence import go_on
from convergence_report import write_report
from convergence_runs import ROWS_A_STEP, Task
from convergence_search import Results, RunFailed, Search, crossing, seconds_at

TASKS = {
    name: Task(name, Path("train"), Path("held"), f"digest of {name}", (480, 96), 100.0) for name in ("words", "forms")
}


class Machine:
    """Runs that take no time: the loss falls the faster, the nearer `learning_rate` is to what fits the method."""

    def __init__(self, killed_after: float = math.inf) -> None:
        self.made: list[str] = []
        self.killed_after = killed_after

    def __call__(self, setting: dict[str, Any], task: Task) -> dict[str, Any]:
        if len(self.made) >= self.killed_after:
            raise KeyboardInterrupt
        self.made.append(Results.key(setting))
        if setting["kind"] != "hyperion":
            a_token = 0.025 if setting["kind"] == "plain" else 0.01
            return {"seconds": [400 * a_token, 1200 * a_token], "tokens": [400, 1200]}
        fits = 2e-3 if len(setting["adapter"]["target_modules"]) == 2 else 1e-4
        rate = setting["training"]["learning_rate"]
        fall = 2.0 / (1 + abs(math.log(rate / fits)))
        fall *= {"pissa": 2.5}.get(setting["adapter"].get("init_lora_weights", ""), 1.0)
        total, every = setting["steps"], setting["eval_every"]
        assert total % every == 0, "the last step is evaluated"
        points = range(0 if setting["eval_on_start"] else every, total + 1, every)
        return {
            "curve": [(step, 1 + 3 * math.exp(-fall * step / 48) + setting["seed"] / 100) for step in points],
            "seconds": [(step, 2.0 * step) for step in range(1, total + 1)],
            "dtype": "float32",
            "preparation": 5.0,
        }


def search(file: Path, machine: Machine, hours: float = 3.0) -> Search:
    results = Results(file)
    results.about = {"command": "x", "date": "today", "machine": "m", "versions": {"python": "3"}, "base": "b"}
    return Search(TASKS, "base", 96, results, machine, hours, say=lambda line: None)


def test_a_crossing_lies_between_evaluations() -> None:
    curve = [(0, 4.0), (10, 3.0), (20, 1.0), (30, 2.0)]
    assert crossing(curve, 2.0) == 15
    assert crossing(curve, 3.0) == 10
    assert crossing(curve, 0.5) is None
    assert crossing(curve, 5.0) == 0
    assert seconds_at([(1, 3.0), (2, 5.0), (4, 9.0)], 3.0) == 7.0
    assert seconds_at([(1, 3.0)], 0.5) == 1.5


def test_the_fastest_wins_and_is_measured_against_the_tuned_baseline(tmp_path: Path) -> None:
    found = search(tmp_path / "found.json", Machine())
    go_on(found, few=False)
    write_report(found)
    assert {reference.rate for reference in found.references.values()} == {2e-3}
    winner = found.winner()
    assert [trial.seed for trial in winner] == [0, 1]
    assert winner[0].candidate.adapter["init_lora_weights"] == "pissa"
    assert winner[0].candidate.training["learning_rate"] == 1e-4
    best = winner[0].steps["words"]
    assert best is not None and best == pytest.approx(96 * 2 / 5, rel=0.1)  # 2.5 times as fast as 96 steps
    assert seconds_at([(1, 2.0), (96, 192.0)], best) == pytest.approx(winner[0].seconds["words"])
    page = (tmp_path / "found.md").read_text(encoding="utf-8")
    assert '"init_lora_weights": "pissa"' in page and '"learning_rate": 0.0001' in page
    plain, ours = (steps * ROWS_A_STEP * 100 * a_token for steps, a_token in ((96, 0.025), (best, 0.01)))
    assert "| words | 0 | 96 |" in page and f"| {plain:.0f} |" in page and f"| {ours:.0f} |" in page
    assert f"| {ours / plain:.2f} |" in page, "of plain float32"
    assert "one of the winner 0.40×" in page and "asks for 0.62× of the steps" in page
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_killed_at_any_run_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = Machine()
    go_on(search(tmp_path / "whole.json", whole), few=False)
    assert len(set(whole.made)) == len(whole.made), "a run was made twice"
    made: list[str] = []
    while len(made) < len(whole.made):
        machine = Machine(killed_after=3)
        found = search(tmp_path / "killed.json", machine)
        with suppress(KeyboardInterrupt):
            go_on(found, few=False)
        assert machine.made, "nothing goes on"
        made += machine.made
    assert made == whole.made
    ends = [json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("whole", "killed")]
    assert ends[0]["runs"].keys() == ends[1]["runs"].keys()


def test_a_run_that_failed_hides_nothing_of_the_others(tmp_path: Path) -> None:
    class Failing(Machine):
        def __call__(self, setting: dict[str, Any], task: Task) -> dict[str, Any]:
            if setting["adapter"].get("loraplus_lr_ratio") == 4.0:
                raise RunFailed("no memory")
            return super().__call__(setting, task)

    first = search(tmp_path / "found.json", Failing())
    go_on(first, few=False)
    assert first.failed and len(first.winner()) == 2
    report = search(tmp_path / "found.json", Machine(), hours=0.0)
    go_on(report, few=False)
    assert report.trials == first.trials and report.winner() == first.winner()


def test_without_hours_nothing_runs_and_the_report_says_what_is_missing(tmp_path: Path) -> None:
    machine = Machine()
    found = search(tmp_path / "none.json", machine, hours=0.0)
    go_on(found, few=False)
    write_report(found)
    assert machine.made == []
    assert "before the baseline was measured" in (tmp_path / "none.md").read_text(encoding="utf-8")
