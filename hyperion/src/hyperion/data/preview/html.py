"""The preview as one HTML file: no script, nothing from the network, every text of the data escaped."""

from __future__ import annotations

import errno
import html
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from hyperion_core.errors import DataError, printable

from .contents import (
    AuditLine,
    Preview,
    SplitFigures,
    figure_rows,
    named_rows,
    packing_note,
    packing_rows,
    percent,
    sample_line,
)
from .spans import Span, visible

_PLOT = 158  # pixels that the highest bar takes; above it its label, below it the axis


def check_writable(path: Path) -> None:
    """Find out before any work is done.

    Raises:
        DataError: the page cannot be written there.
    """
    with _written(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        beside = _beside(path)
        beside.touch()
        beside.unlink()


def write_html(path: Path, preview: Preview) -> None:
    """Write the page beside its place first, so that a file that is there is replaced by a whole one.

    Raises:
        DataError: it cannot be written.
    """
    beside = _beside(path)
    with _written(path):
        try:
            beside.write_text(page(preview), encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path without a name, or with a zero byte
        raise DataError(
            f"the preview cannot be written to {path}",
            why=getattr(error, "strerror", None) or str(error),
            fix="give another --html: a file in a folder that exists and can be written",
        ) from error


def page(preview: Preview) -> str:
    """The whole document."""
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    title = f"Data of {preview.config}"
    sections = [
        _section("Audit", _audit(preview)),
        _section("Samples", _samples(preview)),
        _section("Row lengths", _lengths(preview)),
        _section("Totals", _totals(preview)),
        _section("Packing", _packing(preview)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{_text(title)}</h1>
<p class="quiet">{_text(preview.dataset)}, as {_text(preview.base_model)} will read it</p></header>
{_tiles(preview)}
{"".join(sections)}<p class="quiet">Written by hyperion data preview.</p>
</main>
</body>
</html>
"""


def _tiles(preview: Preview) -> str:
    train = preview.splits[0]
    held_out = f" + {preview.splits[1].rows:,} to evaluate" if len(preview.splits) > 1 else ""
    tiles = [
        (f"{train.rows:,}", f"rows to train on{held_out}"),
        (f"{train.tokens:,}", "tokens an epoch"),
        (percent(train.learnt_share), f"of them learnt: {train.learnt:,}"),
        (f"{preview.steps:,}", "optimizer steps"),
    ]
    drawn = "".join(
        f'<div class="tile"><b>{_text(figure)}</b><span>{_text(what)}</span></div>' for figure, what in tiles
    )
    return f'<div class="tiles">{drawn}</div>'


def _samples(preview: Preview) -> str:
    legend = (
        '<p class="legend"><span><mark>learnt</mark></span><span>only read</span>'
        '<span><span class="special">special token</span></span><span>⏎ line break in the data</span></p>'
    )
    return legend + "".join(
        f'<div class="sample"><h3>{_text(sample_line(sample, preview))}</h3>'
        f"<pre>{sample_html(sample.spans)}</pre></div>"
        for sample in preview.samples
    )


def sample_html(found: Iterable[Span]) -> str:
    """A row; what is learnt in <mark>, special tokens in <span class="special">."""
    parts, inside = [], False
    for span in found:
        if span.learnt is not inside:
            parts.append("<mark>" if span.learnt else "</mark>")
        inside = span.learnt
        if span.left_out:
            parts.append(f'<span class="gap"> … {span.left_out:,} characters … </span>')
            continue
        text = html.escape(visible(span.text)).replace("⏎\n", '<span class="break">⏎</span>\n')
        parts.append(f'<span class="special">{text}</span>' if span.special else text)
    return "".join(parts) + ("</mark>" if inside else "")


def _lengths(preview: Preview) -> str:
    cut = "".join(
        f'<p class="cut-rows">Cut at max_length in the {split.name} data: {_text(named_rows(split.cut))}</p>'
        for split in preview.splits
        if split.cut
    )
    train = preview.splits[0]
    told = (
        f"Tokens of each training row: half have at most {train.median:,}, 95% at most {train.p95:,}, "
        f"the longest has {train.longest:,}. max_length is {preview.max_length:,}."
    )
    return f'<p class="quiet">{told}</p>{_svg(train, preview.max_length)}{cut}'


def _svg(split: SplitFigures, max_length: int) -> str:
    """Bars in percent of the width and pixels of the height, so that letters keep their size on every screen."""
    bars = split.bars
    most, width = max(bar.rows for bar in bars), 100 / len(bars)
    floor, parts = _PLOT + 22, []
    for number, bar in enumerate(bars):
        height = max(2.0, _PLOT * bar.rows / most) if bar.rows else 0
        kind = "bar cut" if bar.cut else "bar"
        told = f"{bar.first:,} to {bar.last:,} tokens: {bar.rows:,} rows{', cut at max_length' if bar.cut else ''}"
        left = number * width
        parts.append(
            f'<rect class="{kind}" x="{left + 0.08 * width:.2f}%" width="{0.84 * width:.2f}%" y="{floor - height:.1f}" '
            f'height="{height:.1f}" rx="2"><title>{told}</title></rect>'
        )
        middle = f'x="{left + width / 2:.2f}%" text-anchor="middle"'
        if bar.rows:
            hidden = ' class="sparse"' if len(bars) > 10 else ""
            parts.append(f'<text {middle} y="{floor - height - 5:.1f}"{hidden}>{bar.rows:,}</text>')
        every = max(1, len(bars) // 6)
        if number % every == 0:
            parts.append(f'<text {middle} y="{floor + 16}">{bar.first:,}</text>')
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{floor}" y2="{floor}"/>')
    parts.append(_limit(split, max_length, floor))
    label = f"Histogram of row lengths, {split.shortest:,} to {split.longest:,} tokens; max_length {max_length:,}"
    return f'<svg role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _limit(split: SplitFigures, max_length: int, floor: int) -> str:
    """max_length between the last whole bar and the first cut one; beyond all bars, an arrow towards it."""
    name = f"max_length {max_length:,}"
    uncut = sum(not bar.cut for bar in split.bars)
    if uncut == len(split.bars):
        return f'<text class="limit-name" x="100%" y="10" text-anchor="end">{name} →</text>'
    at = 100 * uncut / len(split.bars)
    anchor, shift = ("start", 5) if at < 60 else ("end", -5)
    return (
        f'<line class="limit" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="{floor}"/>'
        f'<text class="limit-name" x="{at:.2f}%" dx="{shift}" y="10" text-anchor="{anchor}">{name}</text>'
    )


def _totals(preview: Preview) -> str:
    table = _table(
        ["", *(split.name for split in preview.splits)], ([label, *texts] for label, texts in figure_rows(preview))
    )
    return table + f'<p class="quiet">{_text(preview.schedule)}</p>'


def _packing(preview: Preview) -> str:
    table = _table(["", "padded", "packed"], packing_rows(preview))
    return f'{table}<p class="quiet">{_text(packing_note(preview))}</p>'


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    body = ""
    for label, *texts in rows:
        body += f'<tr><th scope="row">{_text(label)}</th>{"".join(f"<td>{_text(text)}</td>" for text in texts)}</tr>'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _audit(preview: Preview) -> str:
    order = ("refused", "warned", "ok")
    rows = "".join(_audit_line(line) for line in sorted(preview.audit, key=lambda line: order.index(line.state)))
    table = f'<div class="wide"><table class="findings"><tbody>{rows}</tbody></table></div>'
    return f"<p>{_text(preview.audit_summary)}</p>{table}"


def _audit_line(line: AuditLine) -> str:
    below = f'<div class="detail">{_text(chr(10).join(line.details))}</div>' if line.details else ""
    state = f'<td class="state {line.state}">{line.state}</td>'
    return f'<tr>{state}<th scope="row">{_text(line.name)}</th><td>{_text(line.what)}{below}</td></tr>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}</section>\n"


def _text(text: str) -> str:
    return html.escape(printable(text))
