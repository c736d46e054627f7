"""The results of `convergence.py` as a Markdown page, a plot, and the table for the LoRA plugin."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convergence_candidates import CANDIDATES
from convergence_runs import ROWS_A_STEP
from convergence_search import Curve, Search, Trial

STEPS_AT_MOST, TIME_AT_MOST = 0.62, 0.25
_STYLES = {"float32": "-", "bfloat16": "--"}  # of lines
_BLUE, _RED, _GREY = "#1f4e8c", "#d1603d", "#777777"


def write_report(search: Search) -> None:
    """Beside the results: .md and, once there is a baseline, .png."""
    file = search.results.file
    about = search.results.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    sizes = "; ".join(
        f"{name}: {task.rows[0]} rows of {task.tokens:.0f} tokens on average, {task.rows[1]} held out"
        for name, task in search.tasks.items()
    )
    lines = [
        "# Steps and seconds to the usual LoRA's final loss", "",
        f"`{about['command']}`, {about['date']}, {about['machine']}; {versions}.", "",
        f"{about['base']}, {ROWS_A_STEP} rows a step; {sizes}. "
        "The baseline is LoRA of rank 16 on q_proj and v_proj with the default schedule over "
        f"{search.steps} steps, its learning rate tuned on each task; its held-out loss at the end is the target. A "
        "candidate has one setting for all tasks and a schedule of its own length. Steps to the target lie on a "
        "straight line between evaluations. Seconds are steps times the seconds of a step, of training alone, as timed "
        "for all in turn at the end; plain transformers and PEFT pad their rows. Initialising is no training: it is "
        "told apart.", "",
        *_missing(search), *_result(search), *_baselines(search), *_candidates(search), *_table(search),
    ]  # fmt: skip
    file.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    if search.references:
        _draw(search, file.with_suffix(".png"))


def _dtypes(search: Search) -> list[str]:
    """That plain transformers and PEFT were timed in."""
    return [dtype for dtype in _STYLES if any(search.seconds_a_step(task, f"plain {dtype}") for task in search.tasks)]


def _seconds(search: Search, task: str, arm: str, steps: float | None) -> float | None:
    """Of so many steps; None where the arm was not timed, or never gets there."""
    mean = _mean(search, task, arm)
    return mean * steps if mean and steps is not None else None


def _missing(search: Search) -> Iterator[str]:
    wanted = [(task, seed) for task in search.tasks for seed in search.seeds]
    if not all(pair in search.references for pair in wanted):
        yield from ("**The hours were over before the baseline was measured.**", "")
    elif len(winner := search.winner()) < len(search.seeds):
        yield from (f"**The hours were over: the winner has run with {len(winner)} of {len(search.seeds)} seeds.**", "")
    tried = [trial.candidate for trial in search.trials]
    if left := [candidate.name for candidate in CANDIDATES if candidate not in tried]:
        yield from (f"Not tried: {'; '.join(left)}.", "")


def _result(search: Search) -> Iterator[str]:
    trials = search.winner()
    if not trials:
        return
    yield from (f"## {trials[0].candidate.name}", "")
    rows, ratios = [], Ratios()
    for trial in trials:
        for task in trial.steps:
            rows.append(_row(search, trial, task, ratios))
    dtypes = _dtypes(search)
    head = ["task", "seed", "steps: baseline", "winner", "ratio", *(f"seconds: plain {dtype}" for dtype in dtypes),
            "baseline here", "winner", *(f"ratio to plain {dtype}" for dtype in dtypes), "to the baseline here",
            "preparing"]  # fmt: skip
    yield from ("| " + " | ".join(head) + " |", "| --- " * len(head) + "|", *rows, "")
    times = [f"of plain {dtype} {ratios.of(dtype, TIME_AT_MOST)}" for dtype in dtypes]
    times.append(f"of the baseline in Hyperion {ratios.of('here')}")
    yield f"Steps: {ratios.of('steps', STEPS_AT_MOST)}. Time: {', '.join(times)}."
    yield from _shares(search, search.results.runs[next(iter(trials[0].runs.values()))]["result"]["dtype"], dtypes)
    yield from ("", f"![held-out loss]({search.results.file.with_suffix('.png').name})", "")


def _shares(search: Search, dtype: str, dtypes: list[str]) -> Iterator[str]:
    """What of the time is the seconds of a step, and what would have to be the steps."""
    for against in dtypes:
        parts = {
            arm: [_mean(search, task, arm) / plain for task in search.tasks
                  if (plain := _mean(search, task, f"plain {against}"))]
            for arm in ("baseline", "winner")
        }  # fmt: skip
        if not all(parts.values()):
            continue
        baseline, winner = (statistics.mean(of) for of in parts.values())
        yield (
            f"Hyperion computes in {dtype} here: a step of the baseline takes {baseline:.2f}× of plain {against}'s "
            f"seconds, one of the winner {winner:.2f}×. At that, {TIME_AT_MOST:g}× of the time asks for "
            f"{TIME_AT_MOST / winner:.2f}× of the steps."
        )


def _mean(search: Search, task: str, arm: str) -> float:
    """Seconds of a step; 0 where it was not timed."""
    rounds = search.seconds_a_step(task, arm)
    return statistics.mean(rounds) if rounds else 0.0


class Ratios:
    """Ratios of one kind each; None is a target that was not reached."""

    def __init__(self) -> None:
        self._found: dict[str, list[float | None]] = {}

    def add(self, kind: str, value: float | None, against: float | None) -> str:
        ratio = None if value is None or not against else value / against
        self._found.setdefault(kind, []).append(ratio)
        return "–" if ratio is None else f"{ratio:.2f}"

    def of(self, kind: str, most: float | None = None) -> str:
        """Mean and span, and what is asked for."""
        found = self._found.get(kind, [])
        known = [ratio for ratio in found if ratio is not None]
        if not known:
            return "not known"
        text = f"{statistics.mean(known):.2f}× ({min(known):.2f} – {max(known):.2f})"
        if len(known) < len(found):
            text += f" where it was reached, {len(found) - len(known)} of {len(found)} not"
        if not most:
            return text
        reached = len(known) == len(found) and statistics.mean(known) <= most
        return f"{text}, at most {most:g}× is the aim: {'reached' if reached else '**not reached**'}"


def _row(search: Search, trial: Trial, task: str, ratios: Ratios) -> str:
    reference = search.references[task, trial.seed]
    steps = trial.steps[task]
    result = search.results.runs[trial.runs[task]]["result"]
    plain = {dtype: _seconds(search, task, f"plain {dtype}", reference.steps) for dtype in _dtypes(search)}
    here, seconds = _seconds(search, task, "baseline", reference.steps), _seconds(search, task, "winner", steps)
    ratio = ratios.add("steps", steps, reference.steps)
    times = [ratios.add(dtype, seconds, plain[dtype]) for dtype in plain]
    cells = [task, trial.seed, f"{reference.steps:.0f}", _figure(steps, 1), ratio, *map(_figure, plain.values()),
             _figure(here), _figure(seconds), *times, ratios.add("here", seconds, here),
             f"{result['preparation']:.0f} s"]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _figure(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _baselines(search: Search) -> Iterator[str]:
    if not search.rates:
        return
    yield from ("## The baseline", "")
    for task, losses in search.rates.items():
        found = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in sorted(losses.items()))
        seeds = [ref for (name, _), ref in search.references.items() if name == task]
        targets = ", ".join(f"{ref.target:.4f}" for ref in seeds)
        start = f", from {seeds[0].start:.4f}; targets of the seeds: {targets}" if seeds else ""
        yield f"- {task}: held-out loss {found}{start}."
    yield ""
    for task in search.tasks:
        arms = [*(f"plain {dtype}" for dtype in _dtypes(search)), "baseline", "winner"]
        rounds = {arm: search.seconds_a_step(task, arm) for arm in arms}
        shown = [f"{arm} {' and '.join(f'{s:.2f}' for s in of)}" for arm, of in rounds.items() if of]
        if shown:
            yield f"- {task}: seconds of a step, by round: {', '.join(shown)}."
    yield ""


def _candidates(search: Search) -> Iterator[str]:
    if not search.trials:
        return
    tasks = list(search.tasks)
    yield from ("## All that was tried", "")
    yield (
        "By task: steps to the target as a part of the baseline's, or, in brackets, what part of the baseline's gain "
        "was left to be made at the end."
    )
    head = ["candidate", "length", "seed", *tasks, "seconds by the runs' own clocks, of the baseline's"]
    yield from ("", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|")
    for trial in sorted(search.trials, key=lambda trial: (trial.seed, trial.rank)):
        cells = [trial.candidate.name, f"{trial.length:.2g}", str(trial.seed)]
        for task in tasks:
            steps, base = trial.steps[task], search.references[task, trial.seed].steps
            cells.append(f"({trial.gap[task]:.0%})" if steps is None else f"{steps / base:.2f}")
        cells.append(f"{trial.cost:.2f}" if trial.reached else "–")
        yield "| " + " | ".join(cells) + " |"
    yield ""
    if earlier := len(search.results.runs) - search.used:
        yield f"The JSON file has {earlier} more runs, of earlier starts with other candidates or lengths."
        yield ""


def _table(search: Search) -> Iterator[str]:
    trials = search.winner()
    if not trials:
        return
    best = trials[0].candidate
    yield from ("## For `quality: auto`", "", "The table of `hyperion_adapters_lora/recommended.py`:", "", "```python")
    for name, values in (("OPTIONS", best.adapter), ("TRAINING", best.training)):
        yield f"{name}: Mapping[str, Any] = {{"
        yield from (f'    "{key}": {_literal(value)},' for key, value in values.items())
        yield "}"
    yield from ('BASIS = "benchmarks/results/convergence.md"', "```", "")


def _literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(each) for each in value) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value!r}"


def _draw(search: Search, out_png: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(search.tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(search.tasks), 2, squeeze=False, sharey="row")
    winner = search.winner()
    for (steps_axes, seconds_axes), task in zip(grid, search.tasks, strict=True):
        for (name, seed), reference in search.references.items():
            if name != task:
                continue
            result = search.results.runs[reference.run]["result"]
            lines: list[tuple[Any, Curve, str, str, str]] = [
                (steps_axes, result["curve"], _BLUE, "-", "baseline"),
                *((seconds_axes, _by_seconds(search, task, f"plain {dtype}", result["curve"]), _GREY, style,
                   f"baseline, plain {dtype}") for dtype, style in _STYLES.items()),
                (seconds_axes, _by_seconds(search, task, "baseline", result["curve"]), _BLUE, "-",
                 "baseline, in Hyperion"),
            ]  # fmt: skip
            for trial in winner:
                if trial.seed == seed:
                    best = search.results.runs[trial.runs[task]]["result"]
                    curve: Curve = [(0, reference.start), *best["curve"]]
                    lines.append((steps_axes, curve, _RED, "-", "winner"))
                    lines.append(
                        (seconds_axes, _by_seconds(search, task, "winner", curve), _RED, "-", "winner, in Hyperion")
                    )
            for axes, curve, colour, style, label in (line for line in lines if line[1]):
                axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.4, marker=".",
                          label=label if seed == search.seeds[0] else None)  # fmt: skip
            for axes in (steps_axes, seconds_axes):
                axes.axhline(reference.target, color=_GREY, linewidth=0.8, linestyle=":")
        logarithmic = any(r.start > 4 * r.target for (name, _), r in search.references.items() if name == task)
        for axes, label in ((steps_axes, "optimizer steps"), (seconds_axes, "seconds of training")):
            axes.set_xlabel(label)
            axes.set_yscale("log" if logarithmic else "linear")
            axes.grid(alpha=0.25, which="both")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize="small")
        steps_axes.set_ylabel(f"{task}: held-out loss")
    figure.savefig(out_png, dpi=130, metadata={"Software": None})


def _by_seconds(search: Search, task: str, arm: str, curve: Curve) -> Curve:
    """A curve over steps as one over seconds; empty where the arm was not timed."""
    mean = _mean(search, task, arm)
    return [(step * mean, loss) for step, loss in curve] if mean else []
