"""How `convergence.py` looks for the settings that reach the baseline's final loss soonest.

A candidate is scheduled for the length that it is tried at. Successive halving: all are tried at the shortest length,
on every task, with one seed; those that do not get there, but nearest to it, at the next. The best are varied by one
thing each, and what is left is repeated with the other seed, at whose baseline it is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convergence_candidates import BASELINE, BASELINE_RATES, Candidate, neighbours
from convergence_runs import ROWS_A_STEP, Task

from hyperion.models.hardware import choose_dtype

Curve = Sequence[Sequence[float]]
Runner = Callable[[dict[str, Any], Task], dict[str, Any]]

#: Lengths as parts of the baseline's, and how many candidates are tried at each.
RUNGS: tuple[tuple[float, int | None], ...] = ((0.6, None), (0.8, 2))
FINALISTS = 2
#: Parts of the hours after which a stage begins no further run.
UNTIL = {"baseline": 0.8, "neighbours": 0.85, "seeds": 0.95, "timed": 1.3}
_UNTIL_RUNG = (0.74, 0.8)


class OutOfTime(Exception):
    """The hours are over: what was measured stays, and the next start goes on from there."""


def crossing(curve: Curve, target: float) -> float | None:
    """The step at which a curve of (step, loss) first reaches `target`, between evaluations on a straight line.

    Losses fall fastest first, so that the line lies above them: never is a step given that is too early for that.
    """
    before: Sequence[float] | None = None
    for point in curve:
        step, loss = point
        if loss <= target:
            if before is None or before[1] == loss:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = point
    return None


def seconds_at(seconds: Curve, step: float) -> float:
    """Seconds of training until `step`, between steps on a straight line."""
    before: Sequence[float] = (0, 0.0)
    for point in seconds:
        if point[0] >= step:
            share = (step - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


class Results:
    """Every run that was made, by a hash of its setting, in a file that a kill leaves whole."""

    def __init__(self, file: Path) -> None:
        self.file = file
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.runs: dict[str, dict[str, Any]] = content.get("runs", {})
        self.about: dict[str, Any] = content.get("about", {})

    @staticmethod
    def key(setting: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]

    def add(self, name: str, setting: dict[str, Any], wall: float, found: dict[str, Any]) -> None:
        self.runs[self.key(setting)] = {"name": name, "setting": setting, "wall": round(wall, 1), "result": found}
        self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f".{self.file.name}.partial")
        beside.write_text(json.dumps({"about": self.about, "runs": self.runs}, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.file)


@dataclass(frozen=True)
class Reference:
    """The baseline of one task and seed: what it reached, and when."""

    rate: float
    start: float
    target: float
    steps: float
    seconds: float
    run: str


@dataclass(frozen=True)
class Trial:
    """A candidate at one length and seed. By task: steps and seconds to the target, None where it was not reached;
    `gap`: what was left of the baseline's gain at the end."""

    candidate: Candidate
    length: float
    seed: int
    steps: Mapping[str, float | None]
    seconds: Mapping[str, float | None]
    gap: Mapping[str, float]
    cost: float
    runs: Mapping[str, str]

    @property
    def reached(self) -> bool:
        return all(step is not None for step in self.steps.values())

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower is better: those that reached the target by their time to it, the others by what was left."""
        return not self.reached, self.cost if self.reached else statistics.mean(self.gap.values())


@dataclass
class Search:
    """One search. `steps`: of the baseline; `hours`: of all runs that the results hold together."""

    tasks: Mapping[str, Task]
    base: str
    steps: int
    results: Results
    runner: Runner
    hours: float
    seeds: Sequence[int] = (0, 1)
    say: Callable[[str], None] = print
    spent: float = 0.0
    references: dict[tuple[str, int], Reference] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    finalists: list[Trial] = field(default_factory=list)
    rates: dict[str, dict[float, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def baseline(self) -> None:
        """Its learning rate is tuned on each task at its full length; a best one at the edge moves the edge."""
        for task in self.tasks:
            losses = self.rates.setdefault(task, {})
            waiting = list(BASELINE_RATES)
            while waiting:
                rate = waiting.pop(0)
                _, found = self._hyperion(task, _baseline(rate), 1.0, self.seeds[0], UNTIL["baseline"])
                losses[rate] = found["curve"][-1][1]
                if not waiting and (edge := _beyond(losses)) is not None:
                    waiting.append(edge)
            best = min(losses, key=lambda rate: losses[rate])
            for seed in self.seeds:
                key, found = self._hyperion(task, _baseline(best), 1.0, seed, UNTIL["baseline"])
                target = found["curve"][-1][1]
                steps = crossing(found["curve"], target)
                assert steps is not None
                time_to = seconds_at(found["seconds"], steps)
                self.references[task, seed] = Reference(best, found["curve"][0][1], target, steps, time_to, key)

    def halve(self, candidates: Sequence[Candidate]) -> list[Trial]:
        """The trials that are to be repeated with the other seeds, best first."""
        entered = list(candidates)
        for (length, most), until in zip(RUNGS, _UNTIL_RUNG, strict=True):
            tried = self._tried(entered[:most], length, until)
            left = sorted((trial for trial in tried if not trial.reached), key=lambda trial: trial.rank)
            entered = [trial.candidate for trial in left]
            if sum(trial.reached for trial in self.trials) >= FINALISTS:
                break
        if self.trials:
            best = min(self.trials, key=lambda trial: trial.rank)
            self._tried(list(neighbours(best.candidate)), best.length, UNTIL["neighbours"])
            best = min(self.trials, key=lambda trial: trial.rank)
            if best.reached:  # with time to spare, perhaps
                self._tried([best.candidate], 0.75 * best.length, UNTIL["neighbours"])
        self.finalists = sorted(self.trials, key=lambda trial: trial.rank)[:FINALISTS]
        return self.finalists

    def repeat(self, finalists: Sequence[Trial]) -> None:
        for seed in self.seeds[1:]:
            for trial in finalists:
                self._tried([trial.candidate], trial.length, UNTIL["seeds"], seed)

    def timed(self, rounds: int = 2, steps: int = 10) -> None:
        """Some steps of each task, in turn: of plain transformers and PEFT in float32, and where this processor
        multiplies bfloat16 in that too; of the baseline and of the winner, in Hyperion."""
        for number in range(rounds):
            for task in self.tasks:
                shared = {"base": self.base, "data": self.tasks[task].digest, "steps": steps,
                          "rows_a_step": ROWS_A_STEP, "round": number,
                          "machine": self.results.about["machine"]}  # fmt: skip
                for dtype in dict.fromkeys(["float32", choose_dtype("auto", "cpu")]):
                    arm = f"plain {dtype}"
                    setting = {**shared, "kind": "plain", "arm": arm, "dtype": dtype, "adapter": dict(BASELINE)}
                    self._run(f"{arm} on {task}, {steps} steps", setting, self.tasks[task], UNTIL["timed"])
                ours = {"baseline": _baseline(self.references[task, self.seeds[0]].rate)}
                if best := self.winner():
                    ours["winner"] = best[0].candidate
                for arm, candidate in ours.items():
                    setting = {**shared, "kind": "timed", "arm": arm, "seed": number,
                               "adapter": dict(candidate.adapter), "training": dict(candidate.training)}  # fmt: skip
                    self._run(f"{arm} on {task}, {steps} steps", setting, self.tasks[task], UNTIL["timed"])

    def seconds_a_step(self, task: str, arm: str) -> list[float]:
        """As `timed` measured them on this machine, a figure a round: of a step of the task's mean tokens."""
        wanted = {"arm": arm, "data": self.tasks[task].digest, "machine": self.results.about["machine"]}
        if arm == "winner" and (best := self.winner()):
            candidate = best[0].candidate
            wanted |= {"adapter": dict(candidate.adapter), "training": dict(candidate.training)}
        found = []
        for run in self.results.runs.values():
            setting, result = run["setting"], run["result"]
            if all(setting.get(key) == value for key, value in wanted.items()):
                a_token = sum(result["seconds"]) / sum(result["tokens"])
                found.append(a_token * ROWS_A_STEP * self.tasks[task].tokens)
        return found

    @property
    def used(self) -> int:
        """How many of the results' runs this search has asked for."""
        return len(self._seen)

    def winner(self) -> list[Trial]:
        """The best finalist's trials, one a seed that was run."""

        def of(finalist: Trial) -> list[Trial]:
            same = [t for t in self.trials if (t.candidate, t.length) == (finalist.candidate, finalist.length)]
            return sorted(same, key=lambda trial: trial.seed)

        def rank(trials: list[Trial]) -> tuple[int, bool, float]:
            worst = not all(trial.reached for trial in trials)
            return -len(trials), worst, statistics.mean(trial.rank[1] for trial in trials)

        return min((of(each) for each in self.finalists), key=rank, default=[])

    # --- single runs ---

    def _tried(self, candidates: Sequence[Candidate], length: float, until: float, seed: int | None = None
    ) -> list[Trial]:  # fmt: skip
        found = []
        for candidate in candidates:
            try:
                trial = self._trial(candidate, length, self.seeds[0] if seed is None else seed, until)
            except OutOfTime:
                continue  # a later one may have been measured before
            except RunFailed as error:
                self.failed.append(str(error))
                self.say(f"  FAILED: {error}")
                continue
            found.append(trial)
            if trial not in self.trials:
                self.trials.append(trial)
        return found

    def _trial(self, candidate: Candidate, length: float, seed: int, until: float) -> Trial:
        steps: dict[str, float | None] = {}
        seconds: dict[str, float | None] = {}
        gap, runs, costs = {}, {}, []
        for task in self.tasks:
            reference = self.references[task, seed]
            runs[task], found = self._hyperion(task, candidate, length, seed, until)
            curve = [(0, reference.start), *found["curve"]]
            step = steps[task] = crossing(curve, reference.target)
            gap[task] = (curve[-1][1] - reference.target) / (reference.start - reference.target)
            seconds[task] = None if step is None else seconds_at(found["seconds"], step)
            costs.append((seconds[task] or math.inf) / reference.seconds)
        return Trial(candidate, length, seed, steps, seconds, gap, statistics.mean(costs), runs)

    def _hyperion(self, task: str, candidate: Candidate, length: float, seed: int, until: float
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        evaluations = 4 if length == 1 else 3
        every = max(1, round(length * self.steps / evaluations))
        steps = every * round(length * self.steps / every)  # the last one is evaluated
        setting = {
            "kind": "hyperion", "base": self.base, "data": self.tasks[task].digest, "seed": seed, "steps": steps,
            "rows_a_step": ROWS_A_STEP, "eval_every": every,
            "eval_on_start": length == 1,  # every method starts at the base's loss
            "adapter": dict(candidate.adapter), "training": dict(candidate.training),
        }  # fmt: skip
        found = self._run(f"{task}, {steps} steps, seed {seed}: {candidate.name}", setting, self.tasks[task], until)
        return self.results.key(setting), found

    def _run(self, name: str, setting: dict[str, Any], task: Task, until: float) -> dict[str, Any]:
        key = self.results.key(setting)
        if key not in self.results.runs:
            if self.spent >= until * 3600 * self.hours:
                raise OutOfTime
            self.say(f"[{self.spent / 3600:.2f} of {self.hours:g} h] {name} …")
            began = time.monotonic()
            found = self.runner(setting, task)
            self.results.add(name, setting, time.monotonic() - began, found)
            last = f"loss {found['curve'][-1][1]:.4f}" if "curve" in found else f"{found['seconds']} s a step"
            self.say(f"    {last}, {self.results.runs[key]['wall']:.0f} s")
        run = self.results.runs[key]
        if key not in self._seen:
            self._seen.add(key)
            self.spent += run["wall"]
        result: dict[str, Any] = run["result"]
        return result


class RunFailed(Exception):
    """One run ended in an error; the others go on, and it is tried again with the next start."""


def _baseline(rate: float) -> Candidate:
    return Candidate(dict(BASELINE), {"learning_rate": rate})


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The next learning rate outside the grid where the best one is its edge; None inside, and after two moves."""
    best = min(losses, key=lambda rate: losses[rate])
    if len(losses) >= len(BASELINE_RATES) + 2:
        return None
    return best * 2 if best == max(losses) else best / 2 if best == min(losses) else None
