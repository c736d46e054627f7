"""The results of `adaptive_bits.py` as a Markdown page and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_COLOURS = {"torchao": "#1f4e8c", "gptq": "#d1603d"}


def write_report(results: Path) -> None:
    """Beside the results: .md and .png."""
    content = json.loads(results.read_text(encoding="utf-8"))
    arms, settings = content["arms"], content["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        "# Bits by sensitivity against the same bits everywhere", "",
        f"`{content['command']}`, {content['date']}, {content['machine']}; {versions}.", "",
        "SmolLM2-135M-Instruct, symmetric groups of 64, their scales from their largest weights (`mse: 0` of "
        "gptq; the base's own weights lie on a 4-bit grid of groups of 32, which such "
        "groups do not profit from). Real instructions as chats, disjoint rows: "
        f"{settings['rows']} of at most {settings['max_length']} tokens to calibrate on, {settings['held_out']} held "
        "out. At half a bit \"uniform\" gives every other layer one bit more. MB are 10^6 bytes of the linear modules' "
        "weights, scales counted; adaptive is held to what uniform takes. Perplexity is of the held-out answers alone "
        "(the system prompt is the same in every chat), divergence that of the predictions there from the unquantized "
        "model's (KL, nats a token): mean of the calibration seeds, and least to most. The last column is in nats a "
        "token, with the standard error over answers. Bits are shared out by the divergence to be expected; the loss "
        "on text that is not the model's own moves with rounding in both directions besides, and where divergence is "
        "small that can hide the difference.", "",
        *([f"**{len(arms)} of {content['of']} arms are measured so far.**", ""] if len(arms) < content["of"] else []),
        *_post_training(arms, results.with_suffix(".png").name), *_nearest(arms), *_trained(arms), *_ranks(arms),
    ]  # fmt: skip
    results.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    _draw(arms, results.with_suffix(".png"))


def _points(arms: dict[str, Any]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """Figures of all seeds by method, target bits, and "uniform" or "adaptive"."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for name, figures in arms.items():
        method, *rest = name.split("/")
        if method in _COLOURS:
            found.setdefault((method, float(rest[0]), rest[1]), []).append(figures)
    return dict(sorted(found.items()))


def _post_training(arms: dict[str, Any], plot: str) -> Iterable[str]:
    points = _points(arms)
    if not points:
        return
    tokens: list[int] = []
    if found := arms.get("unquantized"):
        tokens = found["tokens"]
        yield f"Unquantized: perplexity {found['perplexity']:.2f}, of {sum(tokens):,} tokens in {len(tokens)} answers."
        yield ""
    kinds = " | ".join(f"{what}, uniform | adaptive" for what in ("MB", "perplexity", "divergence"))
    yield from (f"| method | bits | {kinds} | loss, adaptive less uniform |", "| --- " * 9 + "|")
    for method, target in dict.fromkeys((method, target) for method, target, _ in points):
        pair = [points.get((method, target, kind), []) for kind in ("uniform", "adaptive")]
        sizes = [f"{max(f['linear_bytes'] for f in of) / 1e6:.2f}" if of else "" for of in pair]
        figures = [_span(of, key) for key in ("perplexity", "divergence") for of in pair]
        yield f"| {method} | {target:g} | {' | '.join([*sizes, *figures, _difference(*pair, tokens)])} |"
    yield from ("", f"![perplexity over bytes]({plot})", "")


def _span(figures: list[dict[str, Any]], key: str) -> str:
    if not figures:
        return ""
    found, digits = sorted(f[key] for f in figures), 3 if key == "divergence" else 2
    mean = f"{sum(found) / len(found):.{digits}f}"
    return mean + (f" ({found[0]:.{digits}f} – {found[-1]:.{digits}f})" if len(found) > 1 else "")


def _difference(uniform: list[dict[str, Any]], adaptive: list[dict[str, Any]], tokens: list[int]) -> str:
    """Nats a token, and the standard error over answers, the mean of the seeds being taken for each."""
    if not (uniform and adaptive and tokens):
        return ""
    means = [[sum(of) / len(of) for of in zip(*(f["losses"] for f in arm), strict=True)] for arm in (uniform, adaptive)]
    apart = [after - before for before, after in zip(*means, strict=True)]
    mean = sum(apart) / sum(tokens)
    rest = [each - mean * count for each, count in zip(apart, tokens, strict=True)]
    return f"{mean:+.3f} ± {math.sqrt(sum(each * each for each in rest)) / sum(tokens):.3f}"


def _nearest(arms: dict[str, Any]) -> Iterable[str]:
    rounded = {name.rpartition("/")[2]: of for name, of in arms.items() if name.startswith("nearest/")}
    if not rounded:
        return
    yield from ("## GPTQ against rounding to the nearest step of the same grid", "")
    yield from ("| bits | nearest | GPTQ |", "| --- | --- | --- |")
    for bits, of in sorted(rounded.items()):
        gptq = _span(_points(arms).get(("gptq", float(bits), "uniform"), []), "perplexity")
        yield f"| {bits} | {of['perplexity']:.2f} | {gptq} |"
    yield ""


def _trained(arms: dict[str, Any]) -> Iterable[str]:
    trained = {name.partition("/")[2]: of for name, of in arms.items() if name.startswith("lora/")}
    if not trained:
        return
    yield from ("## After 100 steps of LoRA on top", "")
    yield (
        "One seed, about 512 tokens a step. Losses in nats a token: of the last ten steps, and of the held-out "
        "answers, which perplexity is of too."
    )
    yield from ("", "| base | bits in memory | training loss | held-out loss | perplexity |", "| --- " * 5 + "|")
    for name, of in trained.items():
        bits = ", ".join(map(str, of["bits_in_memory"])) or "16"
        yield f"| {name} | {bits} | {of['training_loss']:.3f} | {of['eval_loss']:.3f} | {of['perplexity']:.2f} |"
    for name, blocks in (("nf4", 64), ("nf4-32", 32)):
        if {"bf16", name} <= trained.keys():
            apart = [trained[name][key] / trained["bf16"][key] - 1 for key in ("training_loss", "eval_loss")]
            yield from ("", f"nf4 in blocks of {blocks} against bf16: training loss {apart[0]:+.1%}, held-out loss "
                        f"{apart[1]:+.1%}.")  # fmt: skip
    yield ""


def _ranks(arms: dict[str, Any]) -> Iterable[str]:
    found = {name.partition("/")[2]: of for name, of in arms.items() if name.startswith("ranks/")}
    if not found:
        return
    yield from ("## Estimated against true changes", "")
    yield (
        f"{len(next(iter(found.values()))['modules'])} modules, each quantized alone to 2, 3 and 4 bits: Spearman's "
        'rank correlation of the estimate with what happens on held-out answers. "divergence" is that of the quantized '
        "model's predictions from the model's (KL): the loss to be expected on text of the model's own. \"loss\" is "
        "the cross-entropy of the text itself. What the measures are: `estimates` in "
        "`benchmarks/adaptive_bits_measures.py`."
    )
    yield from ("", "| method | measure | divergence | at 2 | at 3 | at 4 | loss |", "| --- " * 7 + "|")
    for method, of in found.items():
        for measure in dict.fromkeys(key.partition(" | ")[0] for key in of["ranks"]):
            keys = [f"{measure} | divergence | {widths}" for widths in ("2,3,4", "2", "3", "4")]
            figures = [of["ranks"][key] for key in [*keys, f"{measure} | loss | 2,3,4"]]
            yield f"| {method} | {measure} | {' | '.join(f'{figure:.3f}' for figure in figures)} |"
    yield ""


def _draw(arms: dict[str, Any], out_png: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = _points(arms)
    for method, kind in dict.fromkeys((method, kind) for method, _, kind in points):
        chosen = [(of, target) for (m, target, k), of in points.items() if (m, k) == (method, kind)]
        sizes = [max(f["linear_bytes"] for f in of) / 1e6 for of, _ in chosen]
        spread = [[f["perplexity"] for f in of] for of, _ in chosen]
        means = [sum(of) / len(of) for of in spread]
        bars = [[m - min(of) for m, of in zip(means, spread, strict=True)],
                [max(of) - m for m, of in zip(means, spread, strict=True)]]  # fmt: skip
        axes.errorbar(sizes, means, yerr=bars, color=_COLOURS[method], capsize=3, marker="o", markersize=5,
                      markerfacecolor=_COLOURS[method] if kind == "adaptive" else "white",
                      linestyle="-" if kind == "adaptive" else "--", label=f"{method}, {kind}")  # fmt: skip
    if "unquantized" in arms:
        axes.axhline(arms["unquantized"]["perplexity"], color="#777777", linewidth=1, label="unquantized")
    axes.set_yscale("log")
    axes.set_xlabel("MB of the linear modules' weights")
    axes.set_ylabel("perplexity of held-out answers")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out_png, dpi=130, metadata={"Software": None})
