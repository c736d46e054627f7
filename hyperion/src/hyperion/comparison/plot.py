"""Quality against bytes, as a picture: lower and further left is better."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .grid import Grid, GridRow, shown

# One for each value of the first varied key; further values take them again.
_COLOURS = ("#1f4e8c", "#d1603d", "#3a8f5c", "#8a5aa8", "#b08a1e", "#5b6770")
# Where a label may stand, in points from its own: above, below, at the right, at the left, further above.
_PLACES = (((0, 11), "center"), ((0, -11), "center"), ((8, 0), "left"), ((-8, 0), "right"), ((0, 21), "center"))
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(grid: Grid, results: Mapping[str, Mapping[str, Any]], out_png: Path) -> Path | None:
    """Perplexity after training over the bytes that the base takes in memory, one labelled point a finished row.

    Gives the picture's path, or None where no row has both figures.
    """
    points = [
        (row, results[row.name]["base_bytes"] / 1e6, results[row.name]["perplexity_after"])
        for row in grid.rows
        if results[row.name].get("base_bytes") and results[row.name].get("perplexity_after")
    ]
    if not points:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    first, *others = grid.keys
    groups: dict[str, list[Point]] = {}
    for row, x, y in points:
        groups.setdefault(shown(first, row.values[first]), []).append(Point(x, y, _label(row, first, others)))
    for index, (group, mine) in enumerate(groups.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        xs, ys = zip(*((point.x, point.y) for point in sorted(mine)), strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.35)
        axes.plot(xs, ys, color=colour, linestyle="", marker=marker, markersize=7, label=group)
    perplexities = [y for _, _, y in points]
    if max(perplexities) > 10 * min(perplexities):
        axes.set_yscale("log")
    axes.set_xlabel("base in memory (MB)")
    axes.set_ylabel("held-out perplexity after training")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if others:
        axes.legend(frameon=False, title=first.rpartition(".")[2])
    canvas.draw()  # places are known from here on
    _write_labels(axes, canvas.get_renderer(), list(groups.values()))
    figure.savefig(out_png, dpi=130)
    return out_png


class Point(NamedTuple):
    """One row: MB, perplexity, and what is written at it."""

    x: float
    y: float
    label: str


def _label(row: GridRow, first: str, others: list[str]) -> str:
    said = [f"{key.rpartition('.')[2]} {shown(key, row.values[key])}" for key in others if row.values[key] is not None]
    return ", ".join(said) or shown(first, row.values[first])


def _write_labels(axes: Any, renderer: Any, groups: list[list[Point]]) -> None:
    """Each label beside its point, at the first place where it covers no other label and no point."""
    from matplotlib.transforms import Bbox

    taken = []
    for x, y in axes.transData.transform([(point.x, point.y) for group in groups for point in group]):
        taken.append(Bbox.from_bounds(x - 4, y - 4, 8, 8))
    for index, group in enumerate(groups):
        for point in group:
            for offset, align in _PLACES:
                text = axes.annotate(
                    point.label, (point.x, point.y), xytext=offset, textcoords="offset points", ha=align, va="center",
                    fontsize=8, color=_COLOURS[index % len(_COLOURS)],
                )  # fmt: skip
                box = text.get_window_extent(renderer)
                if not any(box.overlaps(other) for other in taken):
                    break
                if offset != _PLACES[-1][0]:
                    text.remove()
            taken.append(box)
