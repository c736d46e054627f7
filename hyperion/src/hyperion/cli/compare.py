"""`hyperion compare`: one config with some keys varied, and a table of what came of it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hyperion.comparison.runner import Comparison

_COLOURS = {"done": "green", "failed": "red", "refused": "yellow", "not run": "yellow"}


def compare(
    config: Path = typer.Argument(help="YAML or JSON file of a run, with dataset.validation_split."),
    vary: list[str] = typer.Option(
        ..., "--vary", metavar="KEY=VALUE,VALUE", help="A dotted key and its values; may be repeated: all combinations."
    ),
    output_dir: Path = typer.Option(
        Path("hyperion-compare"), "--output-dir", "--output_dir", "-o", help="Folder of the comparison."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Run every combination in a process of its own, and print and save a table and a plot.

    The same command goes on where an interrupted one ended. Exit code 1 when a row failed; the others are kept.
    A row that its plan refuses is in the table with the reason, and is no failure.
    """
    from hyperion_core.context import NoProgress

    from hyperion.comparison.runner import compare as run_grid
    from hyperion.engine.interruption import terminate
    from hyperion.monitoring.progress import RichProgress

    signal.signal(signal.SIGTERM, terminate)
    bars = RichProgress()
    try:
        done = run_grid(
            config,
            _varied(vary),
            output_dir=output_dir,
            progress=NoProgress() if as_json else bars,
            tell=(lambda text: None) if as_json else bars.say,
        )
    except KeyboardInterrupt as stopped:
        typer.echo("\ninterrupted; the same command goes on from here, and finished rows stay as they are", err=True)
        raise typer.Exit(128 + getattr(stopped, "signum", signal.SIGINT)) from None
    _show(done, as_json=as_json)
    if done.failed:
        raise typer.Exit(1)


def _varied(given: list[str]) -> dict[str, list[Any]]:
    from .usage import UsageError
    from .values import key_and_value, parsed

    found: dict[str, list[Any]] = {}
    for text in given:
        key, values = key_and_value("--vary", text)
        if key in found:
            raise UsageError(f"--vary {key} stands twice", why="a key has one list of values",
                             fix=f"--vary {key}=… with all of them, and commas between")  # fmt: skip
        found[key] = parsed("--vary", values, several=True)
    return found


def _show(done: Comparison, *, as_json: bool) -> None:
    from hyperion.comparison.table import JSON, MARKDOWN, PLOT, cells, header, notes

    if as_json:
        from hyperion_core.artifact import read_json

        from .json_output import print_json

        print_json(read_json(done.folder / JSON), ensure_ascii=False)
        return
    from hyperion_core.errors import printable
    from rich.table import Table
    from rich.text import Text

    from .console import out

    table = Table(box=None, pad_edge=False)
    varied = len(done.grid.keys)
    names = header(done.grid)
    for index, name in enumerate(names):
        figure = varied <= index < len(names) - 1
        table.add_column(name, justify="right" if figure else "left", overflow="fold", no_wrap=figure)
    for line in cells(done.grid, done.results):
        colour = _COLOURS[line[-1].partition(":")[0]]
        table.add_row(*map(Text, map(printable, line[:-1])), Text(printable(line[-1]), style=colour))
    console = out()
    console.print(table)
    for note in notes(done.grid, done.results):
        console.print(Text(note, style="dim"))
    saved = [name for name in (MARKDOWN, JSON, PLOT) if (done.folder / name).is_file()]
    console.print(Text(f"saved: {', '.join(saved)} in {done.folder}", style="green"))
