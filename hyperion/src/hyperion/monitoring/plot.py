"""The loss curve of a run, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metrics import MetricsFile

if TYPE_CHECKING:
    from collections.abc import Sequence

_RAW, _SMOOTH, _EVALUATION = "#9db8d9", "#1f4e8c", "#d1603d"


def draw_loss_curve(metrics_file: Path, out_png: Path) -> Path | None:
    """Training loss, as logged and smoothed, and evaluation loss, in nats a supervised token, over optimizer steps.

    Gives the picture's path, or None when no loss was logged.
    """
    lines = MetricsFile(metrics_file).read()
    training = _points(lines, "loss")
    evaluation = _points(lines, "eval_loss")
    if not training and not evaluation:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        few = len(losses) < 10
        axes.plot(
            steps, losses, color=_SMOOTH if few else _RAW, linewidth=1, marker="." if few else "", label="training"
        )
        if not few:
            axes.plot(steps, smoothed(losses), color=_SMOOTH, linewidth=2, label="training, smoothed")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color=_EVALUATION, linewidth=1.5, marker="o", markersize=5, label="evaluation")
        best = min(evaluation, key=lambda point: point[1])
        axes.annotate(f"{best[1]:.3f}", best, xytext=(0, 8), textcoords="offset points", ha="center", color=_EVALUATION)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a supervised token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out_png, dpi=130)
    return out_png


def smoothed(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average, free of the pull to its start (as Adam, arXiv 1412.6980, corrects its moments)."""
    smooth, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smooth.append(average / (1 - weight**count))
    return smooth


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]
