"""The page and the plot of `training_speed.py`, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = {
    "plain:float32": "transformers + PEFT, float32",
    "plain:bfloat16": "transformers + PEFT, bfloat16",
    "trl:": "TRL, packing",
    "trl:checkpointing": "TRL, packing, checkpointing (its default)",
    "trl:liger": "TRL, packing, Liger's kernels",
    "hyperion:": "Hyperion",
}
_COMPILED = "hyperion:+compiled layers"
#: (peer, least ratio of tokens/s, most of peak memory) of SmolLM2 on a CPU; None where nothing is asked.
TARGETS: dict[str, tuple[tuple[str, float, float | None], ...]] = {
    "ragged": (("plain:float32", 3.5, 0.25), ("plain:bfloat16", 2.5, 0.35), ("trl:", 1.8, 0.7)),
    "full": (("plain:float32", 1.2, None), ("plain:bfloat16", 1.2, None), ("trl:", 1.2, None)),
}
_SMALL = "SmolLM2-135M"
_SAME_TYPE = (2.5, 0.35)  # of plain float32 where Hyperion has float32 too, as of plain bfloat16 above


class Measured:
    """Figures of one set of rows by arm and round."""

    def __init__(self, whole: Mapping[str, Any], data: str) -> None:
        self.dtype = _dtype(whole)
        self.has_targets = (whole.get("base", _SMALL), whole.get("device_type", "cpu")) == (_SMALL, "cpu")
        self.rounds: dict[str, dict[int, dict[str, Any]]] = {}
        for key, found in whole["measured"].items():
            name, arm, number = key.split("/")
            if name == data:
                self.rounds.setdefault(arm, {})[int(number)] = found

    def values(self, arm: str, figure: str) -> list[float]:
        return [value(found, figure) for found in self.rounds.get(arm, {}).values()]

    def ratios(self, arm: str, other: str, figure: str) -> list[float]:
        """Of the rounds that have both."""
        mine, theirs = self.rounds.get(arm, {}), self.rounds.get(other, {})
        return [value(mine[number], figure) / value(theirs[number], figure) for number in mine if number in theirs]

    def shares_of_limit(self, arm: str) -> list[float]:
        """Of the tokens a second that matrix products alone would allow, in the rounds that measured these."""
        limits, mine = self.rounds.get(f"limit:{self.dtype}", {}), self.rounds.get(arm, {})
        return [
            value(mine[number], "tokens/s") * limits[number]["flops_a_token"] / (limits[number]["gflops"] * 1e9)
            for number in mine
            if number in limits
        ]


def value(found: Mapping[str, Any], figure: str) -> float:
    if figure == "tokens/s":
        return float(found["tokens"] / found["seconds"])
    return float(found[figure])


def middle(values: list[float], form: str = ".2f") -> str:
    """The median, and from where to where they reach."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def page(whole: Mapping[str, Any], plot: str) -> str:
    """Markdown; `plot`: the picture's file beside it."""
    settings = whole["settings"]
    lines = [
        f"# Speed and memory of training{'' if _dtype(whole) == 'bfloat16' else f', in {_dtype(whole)}'}", "",
        f"`nox -s bench -- training_speed{_option(whole)}`, {whole['date']}, {whole['device']}, "
        + ", ".join(f"{name} {number}" for name, number in whole["versions"].items()) + ".", "",
        f"{_base(whole)}, LoRA of rank {settings['r']} on {' and '.join(settings['target_modules'])}, "
        f"{settings['rows_a_step']} rows a step, at most {settings['max_length']} tokens a row, one epoch. "
        f"{_rounds(whole)} Ratios are taken within a "
        f"round. Tokens are the rows' own, padding not counted; memory is the peak of {_memory(whole)}."
        + _commits(whole), "",
        f"![Tokens a second and peak memory]({plot})", "",
    ]  # fmt: skip
    for data, title in (("ragged", "Instructions of very different lengths"), ("full", "Rows of equal length")):
        measured = Measured(whole, data)
        if measured.rounds:
            lines += [f"## {title}", "", *_table(measured), *_targets(measured, data), *_ablations(measured)]
    return "\n".join([*lines, *(line for note in whole.get("notes", []) for line in (note, ""))]).rstrip() + "\n"


def _rounds(whole: Mapping[str, Any]) -> str:
    count = max((int(key.rpartition("/")[2]) for key in whole["measured"]), default=0) + 1
    if count == 1:
        return "One round."
    return (
        f"Figures are medians over at most {count} rounds, with the least and the greatest; one alone is of one round."
    )


def _dtype(whole: Mapping[str, Any]) -> str:
    """That this processor computes in where nothing else is said."""
    return str(whole.get("dtype", "bfloat16"))


def _option(whole: Mapping[str, Any]) -> str:
    base = whole.get("base", _SMALL)
    return "" if base == _SMALL else f" --base {base}"


def _base(whole: Mapping[str, Any]) -> str:
    base = whole.get("base", _SMALL)
    return (
        f"{_SMALL}-Instruct" if base == _SMALL else f"A Llama of {base}, of random weights, with SmolLM2's vocabulary"
    )


def _memory(whole: Mapping[str, Any]) -> str:
    return "the whole process" if whole.get("device_type", "cpu") == "cpu" else "torch's tensors on the GPU"


def _commits(whole: Mapping[str, Any]) -> str:
    found = sorted({of["commit"] for of in whole["measured"].values() if "commit" in of})
    return f" Code: {', '.join(found)}." if found else ""


def _table(measured: Measured) -> list[str]:
    lines = ["| | tokens/s | peak memory, GB | first step's loss | mean loss | steps |", "| --- |" + " --- |" * 5]
    for arm, name in NAMES.items():
        rounds = list(measured.rounds.get(arm, {}).values())
        if rounds:
            memory = [peak / 1e9 for peak in measured.values(arm, "peak_bytes")]
            losses = rounds[0]["losses"]
            lines.append(
                f"| {name} | {middle(measured.values(arm, 'tokens/s'), '.1f')} | {middle(memory)} | {losses[0]:.4f} | "
                f"{statistics.mean(losses):.4f} | {rounds[0]['steps']} |"
            )
    for dtype in ("bfloat16", "float32"):
        if found := measured.values(f"limit:{dtype}", "gflops"):
            lines.append(f"| products of matrices alone, {dtype}: {middle(found, '.0f')} GFLOP/s |" + " |" * 5)
    if apart := _losses_apart(measured):
        lines += ["", f"Hyperion computes in {measured.dtype}. In no step is its loss more than {apart:.4f} from that "
                  "of transformers + PEFT in float32, on the same rows; TRL's steps have other rows."]  # fmt: skip
    return [*lines, ""]


def _losses_apart(measured: Measured) -> float | None:
    """Of the arms that have the same rows in every step: Hyperion, in its own type, and float32."""
    both = [list(measured.rounds.get(arm, {}).values()) for arm in ("hyperion:", "plain:float32")]
    if not all(both):
        return None
    return max(abs(mine - own) for mine, own in zip(*(rounds[0]["losses"] for rounds in both), strict=True))


def _targets(measured: Measured, data: str) -> list[str]:
    """Hyperion against its peers; where targets were set, beside them."""
    targets = {peer: asked for peer, *asked in TARGETS[data]} if measured.has_targets else {}
    lines = ["| Hyperion against | tokens/s | peak memory |", "| --- | --- | --- |"]
    if targets:
        lines = ["| Hyperion against | tokens/s | wanted | peak memory | wanted |", "| --- |" + " --- |" * 4]
    for peer in targets or [arm for arm in NAMES if arm != "hyperion:"]:
        faster = measured.ratios("hyperion:", peer, "tokens/s")
        smaller = measured.ratios("hyperion:", peer, "peak_bytes")
        if not faster:
            continue
        if not targets:
            lines.append(f"| {NAMES[peer]} | {middle(faster)} | {middle(smaller)} |")
            continue
        same = data == "ragged" and peer == f"plain:{measured.dtype}"
        speed, memory = _SAME_TYPE if same else targets[peer]
        asked = "" if memory is None else f"≤ {memory:g} {reached(statistics.median(smaller) <= memory)}"
        lines.append(
            f"| {NAMES[peer]} | {middle(faster)} | ≥ {speed:g} {reached(statistics.median(faster) >= speed)} | "
            f"{middle(smaller)} | {asked} |"
        )
    if shares := measured.shares_of_limit("hyperion:"):
        wanted = (
            f" (wanted: half, {reached(statistics.median(shares) >= 0.5)})." if targets and data == "ragged" else "."
        )
        lines += ["", f"Of what products of matrices alone would allow in {measured.dtype}: {middle(shares)}{wanted}"]
    waiting = [found["data_seconds"] / found["seconds"] for found in measured.rounds.get("hyperion:", {}).values()]
    if waiting:
        lines += ["", f"Of Hyperion's seconds, {max(waiting):.2%} at most go by while a step waits for its rows."]
    return [*lines, ""]


def reached(true: bool) -> str:
    return "reached" if true else "**not reached**"


def _ablations(measured: Measured) -> list[str]:
    variants = [arm for arm in measured.rounds if arm.startswith("hyperion:") and arm != "hyperion:"]
    without = [arm for arm in variants if "+" not in arm]
    besides = [arm for arm in variants if "+" in arm and arm != _COMPILED]
    lines = []
    for title, arms in (("What each part gives: Hyperion with it, against Hyperion without it.", without),
                        ("What is off by default, and trades speed for memory: Hyperion with it, against Hyperion as it"
                         " is.", besides)):  # fmt: skip
        if arms:
            lines += [title, "", "| | tokens/s | peak memory |", "| --- | --- | --- |"]
            for arm in arms:
                pair = ("hyperion:", arm) if arm in without else (arm, "hyperion:")
                faster, smaller = (measured.ratios(*pair, figure) for figure in ("tokens/s", "peak_bytes"))
                lines.append(f"| {arm.partition(':')[2].strip('+')} | {middle(faster)} | {middle(smaller)} |")
            lines.append("")
    return [*lines, *_compiled(measured)]


def _compiled(measured: Measured) -> list[str]:
    """What `torch.compile` would add; of rounds that know how long their first steps took."""
    both = [
        (mine, measured.rounds["hyperion:"][number])
        for number, mine in measured.rounds.get(_COMPILED, {}).items()
        if "first step" in measured.rounds.get("hyperion:", {}).get(number, {})
    ]
    if not both:
        return []
    longer = [mine["first step"]["seconds"] - other["first step"]["seconds"] for mine, other in both]
    faster = [_later(mine) / _later(other) for mine, other in both]
    return [
        f"Tried, and not kept: `torch.compile` of each layer, around the attention, whose shape is another in each "
        f"pack. Steps after the first come to {middle(faster)} of the tokens a second above, the first takes "
        f"{middle(longer, '.0f')} s longer: on this processor, what is fused by hand leaves nothing for it.", "",
    ]  # fmt: skip


def _later(found: Mapping[str, Any]) -> float:
    """Tokens a second after the first step."""
    first = found["first step"]
    return float((found["tokens"] - first["tokens"]) / (found["seconds"] - first["seconds"]))


def draw(whole: Mapping[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 5.5), constrained_layout=True)
    for row, (data, title) in zip(axes, (("ragged", "ragged rows"), ("full", "rows of equal length")), strict=True):
        measured = Measured(whole, data)
        arms = [arm for arm in reversed(NAMES) if arm in measured.rounds]
        colours = ["#2a6f97" if arm == "hyperion:" else "#b8c4cc" for arm in arms]
        _draw_losses(row[2], measured, title)
        for axis, kind, factor in zip(row[:2], ("tokens/s", "peak_bytes"), (1, 1e-9), strict=True):
            heights = [statistics.median(measured.values(arm, kind)) * factor for arm in arms]
            bars = axis.barh([NAMES[arm] for arm in arms], heights, color=colours)
            axis.bar_label(bars, fmt="%.0f" if factor == 1 else "%.1f", padding=3)
            axis.set_title(f"{title}: {'tokens a second' if factor == 1 else 'peak memory, GB'}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            if factor != 1:
                axis.set_yticklabels([])
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _draw_losses(axis: Any, measured: Measured, title: str) -> None:
    """Of the arms that have the same rows in every step."""
    for arm, style in (("plain:float32", "-"), ("plain:bfloat16", "--"), ("hyperion:", ":")):
        for found in list(measured.rounds.get(arm, {}).values())[:1]:
            steps = range(1, len(found["losses"]) + 1)
            colour = "#2a6f97" if arm == "hyperion:" else "#8a979f"
            axis.plot(steps, found["losses"], style, color=colour, label=NAMES[arm], linewidth=2)
    axis.set_title(f"{title}: loss by step", fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
