"""`hyperion plugins`: what is installed, read from metadata; a broken plugin breaks nothing here."""

from __future__ import annotations

import typer

from . import plugins_doctor, plugins_info, plugins_new

app = typer.Typer(help="What is installed, and whose it is.", no_args_is_help=True)
app.command("new")(plugins_new.new)


@app.command("list")
def list_plugins(
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    kind: str = typer.Option(None, "--kind", help="Only this kind: adapter, scheduler, …"),
) -> None:
    """List every plugin: kind, name, distribution, version, origin, state. Imports none of them."""
    from hyperion_core.kinds import KINDS
    from hyperion_core.registry import registry

    from .usage import known_kind

    known_kind("hyperion plugins list", kind)
    kinds = [each.kind for each in KINDS]
    found = registry()
    rows = [
        {
            "kind": entry.kind,
            "name": entry.name,
            "distribution": entry.distribution,
            "version": entry.version,
            "origin": entry.origin,
            "state": found.state(entry),
        }
        for entry in found.entries(kind)
        if entry.kind in kinds
    ]
    if as_json:
        from .json_output import print_json

        print_json(rows)
        return
    from rich.table import Table
    from rich.text import Text

    from .console import out

    table = Table("kind", "name", "distribution", "version", "origin", "state", box=None, pad_edge=False)
    for row in rows:
        colour = "green" if row["state"] == "ok" else "red"
        table.add_row(*map(Text, list(row.values())[:-1]), Text(row["state"], style=colour))
    out().print(table)


app.command("info")(plugins_info.info)
app.command("doctor")(plugins_doctor.doctor)


@app.callback()
def plugins() -> None:
    """Subcommands follow."""
