"""Bits by module as a table: how many modules of each kind have how many bits."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from hyperion_core.errors import printable
from hyperion_core.facts import BitPlan, ModelFacts

if TYPE_CHECKING:
    from rich.table import Table

    from .allocation import Sizes


def bit_plan_lines(plan: BitPlan, facts: ModelFacts) -> list[str]:
    """The table as plain text, for a log."""
    from rich.console import Console

    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(bit_plan_table(plan, facts))
    return [line.rstrip() for line in captured.get().splitlines()]


def bit_plan_table(plan: BitPlan, facts: ModelFacts, sizes: Sizes | None = None) -> Table:
    """One line for each kind of linear module, one column for each width in use, and the mean a weight.

    Args:
        sizes: adds a column of MB (10^6 bytes), as `allocation.module_sizes` gives them.
    """
    from rich.table import Table

    kinds: dict[str, list[tuple[str, int, int]]] = {}
    for module in facts.linear():
        found = (module.name, plan.of(module.name)[0], math.prod(module.shape))
        kinds.setdefault(module.name.rpartition(".")[2], []).append(found)
    every = [each for modules in kinds.values() for each in modules]
    widths = sorted({bits for _, bits, _ in every})

    table = Table(box=None, pad_edge=False)
    table.add_column("modules", style="bold cyan")
    for bits in widths:
        table.add_column(f"{bits} bits", justify="right")
    table.add_column("mean bits", justify="right")
    if sizes is not None:
        table.add_column("MB", justify="right")
    for kind, modules in [*kinds.items(), ("all", every)]:
        counts = Counter(bits for _, bits, _ in modules)
        mean = sum(bits * weights for _, bits, weights in modules) / sum(weights for *_, weights in modules)
        line = [printable(kind), *(str(counts[bits]) if counts[bits] else "·" for bits in widths), f"{mean:.2f}"]
        if sizes is not None:
            line.append(f"{sum(sizes[name].get(bits, sizes[name][16]) for name, bits, _ in modules) / 1e6:.1f}")
        table.add_row(*line, style="bold" if kind == "all" else "")
    return table
