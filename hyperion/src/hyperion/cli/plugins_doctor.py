"""`hyperion plugins doctor`: every plugin in a process of its own, and what surrounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hyperion_core.distributions import PluginEntry
    from hyperion_core.doctor import Examination
    from hyperion_core.errors import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    names: list[str] = typer.Argument(None, metavar="[NAME]...", help="Only these plugins; all when left out."),
    timeout: float = typer.Option(60.0, "--timeout", min=0.1, help="Seconds that each plugin has."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Import, make and check every plugin, each in a process of its own; exit code 1 when there is a problem.

    Where the command `hyperion` is itself another project's: python -m hyperion_core.doctor
    """
    from hyperion_core.doctor import as_data, chosen, worst
    from hyperion_core.environment import environment_findings

    entries = chosen(names or [])
    environment = environment_findings()
    examinations = sorted(_examined(entries, timeout, quiet=as_json), key=lambda each: entries.index(each.entry))
    if as_json:
        from .json_output import print_json

        print_json(as_data(environment, examinations))
    else:
        _show(environment, examinations)
    if "problem" in (worst(environment), *(each.state for each in examinations)):
        raise typer.Exit(1)


def _examined(entries: list[PluginEntry], timeout: float, *, quiet: bool) -> list[Examination]:
    from hyperion_core.doctor import examine
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    console = Console(stderr=True)
    columns = (TextColumn("examining plugins"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    done = []
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=len(entries))
        for each in examine(entries, timeout=timeout):
            done.append(each)
            progress.update(task, advance=1, description=Text(each.entry.qualified).markup)
    return done


def _show(environment: list[Finding], examinations: list[Examination]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .console import out

    console = out()
    table = Table("kind", "name", "distribution", "contract", "import", "state", box=None, pad_edge=False)
    for each in examinations:
        entry = each.entry
        contract = "unknown" if entry.contract is None else entry.contract or "any"
        cost = "-" if each.seconds is None else f"{each.seconds:.2f} s"
        row = (entry.kind, entry.name, entry.whose, contract, cost)
        table.add_row(*map(Text, row), Text(each.state, style=_COLOURS[each.state]))
    console.print(table)
    findings = [*environment, *(finding for each in examinations for finding in each.findings)]
    for finding in sorted(findings, key=lambda finding: finding.level):
        console.print()
        console.print(Text(f"{finding.level}: ", style=f"bold {_COLOURS[finding.level]}") + Text(str(finding)))
    counts = [
        f"{count} {level}{'' if count == 1 else 's'}"
        for level in ("problem", "warning")
        if (count := sum(finding.level == level for finding in findings))
    ]
    console.print(f"\n{len(examinations)} examined: {', '.join(counts) or 'all is well'}")
