"""What commands print: tables on stdout, errors on stderr."""

from __future__ import annotations

import sys

from hyperion_core.errors import HyperionError, printable
from hyperion_core.plan import Plan
from rich.console import Console
from rich.table import Table
from rich.text import Text

# In a pipe nothing is cut short: rich would take 80 columns.
_PIPE_WIDTH = 200
_COLOURS = {"ok": "green", "untested": "yellow", "unknown": "yellow", "note": "cyan"}


def out() -> Console:
    """Standard output: coloured on a terminal, plain in a pipe."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def show_error(error: HyperionError) -> None:
    """What went wrong, on stderr: "why" and "fix" stand out."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    lines = str(error).splitlines()
    console.print(Text("error: ", style="bold red") + Text(lines[0]))
    for line in lines[1:]:
        label, colon, rest = line.partition(":")
        if colon and label.strip() in ("why", "fix"):
            style = "green" if label.strip() == "fix" else "dim"
            console.print(Text(label + colon, style=style) + Text(rest))
        else:
            console.print(Text(line))


def show_plan(plan: Plan) -> None:
    """The plan as a table, what it checked below."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold cyan")
    table.add_column(overflow="fold")
    for label, text in plan.rows():
        table.add_row(label, Text(printable(text), style="bold yellow" if "ON:" in text else ""))
    console = out()
    console.print(table)
    for check in plan.checks:
        console.print(
            Text(f"{check.state}: ", style=_COLOURS[check.state]) + Text(printable(f"{check.what}: {check.detail}"))
        )
