"""`hyperion plugins new`: the repository of a plugin of one's own, that passes its tests as it is written."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def new(
    kind: str = typer.Argument(help="adapter, quantizer, scheduler or deploy-target."),
    name: str = typer.Argument(help="The plugin's name, as configs will write it: my-method."),
    folder: Path = typer.Option(
        None, "--folder", help="The repository's folder; must not exist yet. Default: ./hyperion-KIND-NAME."
    ),
) -> None:
    """Write a complete plugin repository that passes its conformance suite: yours to change."""
    from rich.text import Text

    from hyperion.new_plugin import new_plugin, write

    from .console import out

    plugin = new_plugin(kind, name, folder)
    write(plugin)
    where = os.path.relpath(plugin.folder) if not plugin.folder.is_absolute() else str(plugin.folder)
    say = out()
    say.print(Text(f"Wrote {where}", style="green"))
    notes = {plugin.module: "the plugin: change this", plugin.test: "what Hyperion expects of it"}
    for path in sorted(plugin.files()):
        note = f"  ← {notes[path]}" if path in notes else ""
        say.print(Text(f"  {path.as_posix()}") + Text(note, style="cyan"))
    steps = [
        f'cd "{where}"' if " " in where else f"cd {where}",
        'python -m pip install -e ".[test]"',
        "python -m pytest",
    ]
    say.print(Text("\nIt works as it is. Install it beside hyperion, and see:"))
    say.print(Text("\n".join(f"  {step}" for step in steps)))
    if plugin.config:
        say.print(Text("\nThen in a config:"))
        say.print(Text("\n".join(f"  {line}" for line in plugin.config.splitlines())))
