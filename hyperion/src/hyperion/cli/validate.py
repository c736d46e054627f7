"""`hyperion validate`: the plan of a run, without running it."""

from __future__ import annotations

from pathlib import Path

import typer


def validate(config: Path = typer.Argument(help="YAML or JSON file of the run.")) -> None:
    """Check a config and print the plan of its run; loads no model."""
    from rich.text import Text

    from hyperion.config import FinetuneConfig
    from hyperion.planning import make_plan

    from .console import out, show_plan

    planned = make_plan(FinetuneConfig.from_file(config))
    show_plan(planned.plan)
    out().print(Text(f"{config} is valid.", style="green") + Text(f" Run it: hyperion train {config}"))
