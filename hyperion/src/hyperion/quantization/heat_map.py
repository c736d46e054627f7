"""Bits by module as a picture: one column a layer, one row a kind of module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# From what was rounded most, dark, to what stays as it is, pale; each width has its own colour, so no scale is needed.
_WIDTHS = range(1, 17)
_MAP = "viridis"
_MOST_LABELLED = 64


def draw_heat_map(bits: Mapping[str, int], out_png: Path, title: str = "") -> Path:
    """Draw the bits of modules whose names hold their layer's number ("model.layers.3.mlp.up_proj").

    Modules of no layer stand in a column of their own, at the right. Gives the picture's path.
    """
    import math

    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = {_place(name): width for name, width in bits.items()}
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: math.inf if layer is None else layer)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = [[cells.get((layer, kind), math.nan) for layer in layers] for kind in kinds]

    figure = Figure(
        figsize=(max(5.0, 2.4 + 0.28 * len(layers)), max(2.2, 1.3 + 0.32 * len(kinds))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps[_MAP]

    def colour(width: float) -> tuple[float, float, float, float]:
        return colours(math.log2(width) / math.log2(_WIDTHS[-1]))

    picture = [[(1.0, 1.0, 1.0, 1.0) if math.isnan(width) else colour(width) for width in row] for row in grid]
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    if len(layers) <= _MOST_LABELLED:
        for row, widths in enumerate(grid):
            for column, width in enumerate(widths):
                if not math.isnan(width):
                    dark = sum(colour(width)[:3]) < 1.4
                    axes.text(column, row, f"{width:g}", ha="center", va="center", fontsize=7,
                              color="white" if dark else "black")  # fmt: skip
    every = max(1, math.ceil(len(layers) / 32))
    axes.set_xticks(range(0, len(layers), every), ["–" if each is None else str(each) for each in layers[::every]])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xticks([edge - 0.5 for edge in range(1, len(layers))], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, len(kinds))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    if title:
        axes.set_title(title, fontsize=9)
    present = sorted(set(bits.values()))
    handles = [Patch(color=colour(width), label=f"{width} bits") for width in present]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    figure.savefig(out_png, dpi=130, metadata={"Software": None})
    return out_png


def _place(name: str) -> tuple[int | None, str]:
    """(layer, kind) of a module: the first number in its name, and what follows that."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[index + 1 :])
    return None, name
