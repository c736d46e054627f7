"""`hyperion lock`: record what a run stands on, for `hyperion train --locked`."""

from __future__ import annotations

from pathlib import Path

import typer


def lock(
    config: Path = typer.Argument(help="YAML or JSON file of the run."),
    output: Path = typer.Option(
        None, "--output", "-o", help="The lock file, in place of hyperion.lock beside the config."
    ),
) -> None:
    """Write hyperion.lock: plugins, libraries, model files and data, with versions and hashes. Trains nothing."""
    from rich.text import Text

    from hyperion.config import FinetuneConfig
    from hyperion.lock import gather_for, lock_path, run_name, write_lock
    from hyperion.monitoring.progress import RichProgress
    from hyperion.planning import make_plan

    from .console import out

    wanted = FinetuneConfig.from_file(config)
    facts = gather_for(make_plan(wanted), RichProgress())
    path = output or lock_path(wanted)
    write_lock(path, run_name(wanted), facts)
    counts = ", ".join(f"{len(section)} of {name}" for name, section in facts.items())
    then = f" ({counts}). Hold a run to it: hyperion train {config} --locked"
    out().print(Text(f"wrote {path}", style="green") + Text(then))
