"""`hyperion data`: what a run would learn from, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import data_preview

if TYPE_CHECKING:
    from hyperion.data.audit.findings import AuditReport

app = typer.Typer(
    name="data", help="See and audit what a run would learn from.", no_args_is_help=True, rich_markup_mode="rich"
)
_COLOURS = {"ok": "green", "warned": "yellow", "refused": "red"}
app.command("preview")(data_preview.preview)


@app.command("audit")
def audit(
    config: Path = typer.Argument(help="YAML or JSON file of the run."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check what a run would learn from its data; loads no weights; exit code 2 when something is refused."""
    from hyperion_core.context import NoProgress

    from hyperion.auditing import audit_config
    from hyperion.config import FinetuneConfig
    from hyperion.monitoring.progress import RichProgress

    read = FinetuneConfig.from_file(config)
    progress = NoProgress() if as_json else RichProgress()
    report = audit_config(read, progress).report
    if as_json:
        from .json_output import print_json

        print_json(report.as_data(), ensure_ascii=False)
        if not report.passed:
            raise typer.Exit(2)
        return
    show_audit(report)
    report.refuse()


def show_audit(report: AuditReport) -> None:
    """What passed and what is warned of; refusals are told by the error."""
    from rich.text import Text

    from .console import out

    console = out()
    for finding in report.findings:
        if finding.state == "refused":
            continue
        console.print(Text(f"{finding.state}: ", style=_COLOURS[finding.state]) + Text(str(finding)))
    console.print(report.summary())
