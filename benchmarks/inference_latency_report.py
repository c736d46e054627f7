"""The results of `inference_latency.py` as a Markdown page and a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference_latency_arms import ARMS, NEW, PROMPT

_LATENCY, _DISK = 0.69, 0.26  # at most, of unmerged and of float16
_UNMERGED = ("unmerged float32", "unmerged bfloat16")
_PACKAGES = ("package", "package, compiled")
_MERGED = "merged float32"  # float16 weights, computed in float32: what quality is compared with


def write_report(results: Path) -> None:
    """Beside the results: .md and .png."""
    content = json.loads(results.read_text(encoding="utf-8"))
    arms = {name: of for name, of in content["arms"].items() if "quality" in of}
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    rounds = max((len(of.get("rounds", {})) for of in arms.values()), default=0)
    plot = results.with_suffix(".png").name
    lines = [
        "# Inference: latency, bytes on disk, quality", "",
        f"`{content['command']}`, {content['date']}, {content['machine']}; {versions}.", "",
        f"SmolLM2-135M-Instruct, tuned with LoRA (r 16 on q and v) on real instructions. Batch 1, {PROMPT} tokens of "
        f"prompt, {NEW} new ones, greedy; {rounds} rounds of all arms in turn, each in a process of its own: medians. "
        "Ratios are taken within a round: their median, least and most in brackets. Disk is the weights' files, MB "
        "of 10^6 bytes; start-up is from the files to the end of a first answer, compiling included. Quality is that "
        "of the weights, computed in float32, on "
        f"{len(next(iter(arms.values()), {'tokens': []})['tokens'])} held-out answers: perplexity, and how much the "
        "loss rises over the merged model's, nats a token, with the standard error over answers; divergence (KL) is "
        "that of the predictions from the merged model's.", "",
        *_table(arms), "", *_verdict(arms), "",
        *(line for note in content["notes"] for line in (note, "")), f"![latency and disk]({plot})",
    ]  # fmt: skip
    results.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    _draw(arms, results.with_suffix(".png"))


def _table(arms: dict[str, Any]) -> Iterator[str]:
    columns = ["", "how", "ms a token", *(f"of {name}" for name in _UNMERGED), "ms of the prompt", "start-up, s",
               "peak memory, MB", "disk, MB", "of float16", "perplexity", "loss", "divergence"]  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "| --- " * len(columns) + "|"
    for name, of in arms.items():
        medians = [f"{_median(of, key):.{digits}f}" if of.get("rounds") else ""
                   for key, digits in (("token", 1), ("prompt", 0), ("start", 0), ("memory", 0))]  # fmt: skip
        ratios = [_span(_ratios(arms, name, against)) for against in _UNMERGED]
        share = _share(arms, name)
        cells = [name, ARMS[name].what, medians[0], *ratios, *medians[1:], f"{of['disk'] / 1e6:.1f}",
                 f"{share:.3f}×" if share else "", f"{of['quality']['perplexity']:.2f}", _loss(arms, name),
                 f"{of['quality']['divergence']:.3f}"]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _verdict(arms: dict[str, Any]) -> Iterator[str]:
    against = _fastest_unmerged(arms)
    for name in _PACKAGES:
        if ratios := _ratios(arms, name, against):
            within = "within" if statistics.median(ratios) <= _LATENCY else "not within"
            yield (
                f"The {name}, against {against}, the unmerged model's faster format here: {_span(ratios)} the latency "
                f"a token, {within} {_LATENCY}×."
            )
            yield ""
    if "package" in arms and (share := _share(arms, "package")):
        within = "within" if share <= _DISK else "not within"
        lost = _loss(arms, "package")
        yield f"On disk {share:.3f}× of the merged model in float16, {within} {_DISK}×; loss: {lost} nats a token."


def _fastest_unmerged(arms: dict[str, Any]) -> str:
    """What is compared with: the format that somebody who has not merged would take on this machine."""
    return min((name for name in _UNMERGED if arms.get(name, {}).get("rounds")), default=_UNMERGED[0],
               key=lambda name: _median(arms[name], "token"))  # fmt: skip


def _median(of: dict[str, Any], key: str) -> float:
    return statistics.median(figures[key] for figures in of["rounds"].values())


def _ratios(arms: dict[str, Any], name: str, against: str) -> list[float]:
    """Of the latency a token, by round."""
    one, two = (arms.get(each, {}).get("rounds", {}) for each in (name, against))
    return [one[number]["token"] / two[number]["token"] for number in one if number in two]


def _span(ratios: list[float]) -> str:
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} – {max(ratios):.2f})"


def _share(arms: dict[str, Any], name: str) -> float:
    merged = arms.get(_MERGED)
    return arms[name]["disk"] / merged["disk"] if merged else 0.0


def _loss(arms: dict[str, Any], name: str) -> str:
    """Nats a token over the merged model's, and the standard error over answers."""
    if _MERGED not in arms or name == _MERGED:
        return ""
    tokens = arms[name]["tokens"]
    before, after = (arms[each]["quality"]["losses"] for each in (_MERGED, name))
    apart = [new - old for old, new in zip(before, after, strict=True)]
    mean = sum(apart) / sum(tokens)
    rest = [each - mean * count for each, count in zip(apart, tokens, strict=True)]
    return f"{mean:+.3f} ± {math.sqrt(sum(each * each for each in rest)) / sum(tokens):.3f}"


def _draw(arms: dict[str, Any], out_png: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [name for name, of in arms.items() if of.get("rounds")][::-1]
    against = _fastest_unmerged(arms)
    colours = ["#1f4e8c" if name.startswith("package") else "#9db4cf" for name in names]
    for axes, values, what, most in (
        (left, [statistics.median(_ratios(arms, name, against) or [0]) for name in names],
         f"latency a token, of {against}", _LATENCY),
        (right, [_share(arms, name) for name in names], "disk, of the merged model in float16", _DISK),
    ):  # fmt: skip
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
        axes.axvline(most, color="#d1603d", linewidth=1, linestyle="--")
        axes.set_xlabel(what)
        if max(values, default=1) > 4:  # some take many times as long
            axes.set_xscale("log")
            axes.set_xlim(0.1, 2 * max(values))
        else:
            axes.set_xlim(0, 1.15 * max(values, default=1) or 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(out_png, dpi=130, metadata={"Software": None})
