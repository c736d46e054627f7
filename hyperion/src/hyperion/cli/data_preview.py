"""`hyperion data preview`: what a run will learn from, before it does."""

from __future__ import annotations

from pathlib import Path

import typer


def preview(
    config: Path = typer.Argument(help="YAML or JSON file of the run."),
    rows: int = typer.Option(3, "--rows", min=1, help="Samples to show."),
    html: Path = typer.Option(None, "--html", help="Write all of it to this HTML file, in place of the terminal."),
) -> None:
    """Show what a run would learn: samples, row lengths, totals, packing, and the audit. Loads no weights."""
    from rich.text import Text

    from hyperion.auditing import audit_config
    from hyperion.config import FinetuneConfig
    from hyperion.data.preview.collect import collect
    from hyperion.data.preview.html import check_writable, write_html
    from hyperion.data.preview.terminal import show
    from hyperion.monitoring.progress import RichProgress

    from .console import out

    read = FinetuneConfig.from_file(config)
    if html is not None:
        check_writable(html)
    shown = collect(read, audit_config(read, RichProgress()), rows=rows)
    if html is None:
        show(shown, out())
        return
    write_html(html, shown)
    out().print(Text(f"wrote {html}", style="green") + Text("; open it in a browser"))
