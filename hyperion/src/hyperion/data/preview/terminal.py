"""The preview on a terminal, or as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Iterable

from hyperion_core.errors import printable
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .contents import (
    Preview,
    SplitFigures,
    figure_rows,
    named_rows,
    packing_note,
    packing_rows,
    sample_line,
)
from .spans import Span, visible

_BAR = 40
_STATES = {"ok": "green", "warned": "yellow", "refused": "bold red"}
_OPEN, _CLOSE = "⟦", "⟧"


def show(preview: Preview, console: Console) -> None:
    """Print everything. Learnt text is coloured on a terminal, and stands in ⟦…⟧ where there are no colours."""
    marked = console.color_system is None or console.no_color
    _head(console, f"Samples of {preview.dataset}")
    legend = Text("learnt: ")
    legend += Text(f"{_OPEN}like this{_CLOSE}") if marked else Text("like this", _style(True))
    console.print(legend + Text("; the rest is only read. ⏎ is a line break in the data."))
    for sample in preview.samples:
        console.print()
        console.print(Text(sample_line(sample, preview), style="bold"))
        console.print(sample_text(sample.spans, marked=marked))
    _head(console, "Row lengths, in tokens")
    for split in preview.splits[:1]:
        for line in _bars(split, preview.max_length):
            console.print(line)
    for split in preview.splits:
        if split.cut:
            cut = f"cut at max_length in the {split.name} data: {named_rows(split.cut)}"
            console.print(Text(cut, style="yellow"))
    _head(console, "Totals")
    console.print(_table(["", *(split.name for split in preview.splits)], figure_rows(preview)))
    console.print(Text(preview.schedule, style="dim"))
    _head(console, "Packing")
    packing = ((label, [padded, packed]) for label, padded, packed in packing_rows(preview))
    console.print(_table(["", "padded", "packed"], packing))
    console.print(Text(packing_note(preview), style="dim"))
    _head(console, "Audit")
    for finding in preview.audit:
        state = Text(f"{finding.state:<8} ", style=_STATES[finding.state])
        console.print(state + Text(f"{finding.name}: ", style="bold") + Text(printable(finding.what)))
        for detail in finding.details:
            console.print(Text(f"{'':9}{printable(detail)}", style="dim"))
    console.print(Text(printable(preview.audit_summary)))


def sample_text(found: Iterable[Span], *, marked: bool) -> Text:
    """A row as text, indented; with `marked`, learnt text in ⟦…⟧."""
    text, inside = Text(), False
    for span in found:
        if marked and span.learnt is not inside:
            text.append(_OPEN if span.learnt else _CLOSE)
        inside = span.learnt
        if span.left_out:
            text.append(f" … {span.left_out:,} characters … ", style="italic yellow")
        else:
            text.append(visible(span.text), style=_style(span.learnt, span.special))
    if marked and inside:
        text.append(_CLOSE)
    lines = text.split("\n", allow_blank=True)
    if lines and not lines[-1].plain:
        lines.pop()
    return Text("\n").join(Text("  ") + line for line in lines)


def _style(learnt: bool, special: bool = False) -> str:
    if learnt:
        return "bold black on green" if not special else "bold white on dark_green"
    return "magenta" if special else ""


def _bars(split: SplitFigures, max_length: int) -> Iterable[Text]:
    most = max(bar.rows for bar in split.bars)
    labels = [f"{bar.first:,}–{bar.last:,}" if bar.first < bar.last else f"{bar.first:,}" for bar in split.bars]
    width = max(len(label) for label in labels)
    limit = Text(f"{'':>{width}}  ╌╌ max_length {max_length:,} " + "╌" * 20, style="yellow")
    cut_before = False
    for bar, label in zip(split.bars, labels, strict=True):
        if bar.cut and not cut_before:
            yield limit
        cut_before = bar.cut
        full = round(_BAR * bar.rows / most) if bar.rows else 0
        drawn = "█" * full or ("▏" if bar.rows else "")
        line = Text(f"{label:>{width}}  ") + Text(drawn, style="yellow" if bar.cut else "cyan")
        yield line + Text(f" {bar.rows:,}" if bar.rows else " ·", style="dim")
    if not cut_before:
        yield limit


def _table(columns: list[str], rows: Iterable[tuple[str, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, style="bold cyan" if number == 0 else "", overflow="fold")
    for label, texts in rows:
        table.add_row(label, *texts)
    return table


def _head(console: Console, title: str) -> None:
    console.print()
    console.print(Text(printable(title), style="bold underline"))
