"""What a preview shows, apart from how it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .figures import Bar, Padding
from .spans import Span

_ROWS_NAMED = 12


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of the training data. `number` counts from 0, as the audit does; `uncut` are its tokens before a cut."""

    number: int
    tokens: int
    learnt: int
    uncut: int
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class SplitFigures:
    """One of the two data sets in figures. Lengths are before any cut; `cut` holds row numbers from 0."""

    name: str
    rows: int
    tokens: int
    learnt: int
    shortest: int
    median: int
    p95: int
    longest: int
    cut: list[int]
    dropped: int
    bars: list[Bar]

    @property
    def learnt_share(self) -> float:
        return self.learnt / max(1, self.tokens)


@dataclass(frozen=True, slots=True)
class AuditLine:
    """What one check of the audit found; `details` are lines of why, fix and examples."""

    name: str
    state: Literal["ok", "warned", "refused"]
    what: str
    details: list[str]


@dataclass(frozen=True, slots=True)
class Preview:
    """Everything that is shown of a config's data.

    `padded` is the first epoch of the training data in batches of `batch_size` rows, `packs` the same in packs of up to
    `capacity` tokens; `why_padded` is what keeps the run from packing, "" where nothing does.
    """

    config: str
    base_model: str
    dataset: str
    max_length: int
    samples: list[Sample]
    splits: list[SplitFigures]
    steps: int
    schedule: str
    batch_size: int
    padded: Padding
    packs: int
    capacity: int
    why_padded: str
    audit_summary: str = ""
    audit: list[AuditLine] = field(default_factory=list)


def figure_rows(preview: Preview) -> list[tuple[str, list[str]]]:
    """The table of totals: a label, and a text for each split."""
    splits = preview.splits
    return [
        ("rows", [f"{split.rows:,}" for split in splits]),
        ("tokens", [f"{split.tokens:,}" for split in splits]),
        ("learnt tokens", [f"{split.learnt:,} ({percent(split.learnt_share)})" for split in splits]),
        ("tokens a row", [f"{s.shortest:,} to {s.longest:,}, median {s.median:,}, 95% ≤ {s.p95:,}" for s in splits]),
        ("cut at max_length", [f"{len(split.cut):,}" for split in splits]),
        ("left out, nothing to learn", [f"{split.dropped:,}" for split in splits]),
        ("optimizer steps", [f"{preview.steps:,}" if number == 0 else "–" for number in range(len(splits))]),
    ]


def packing_rows(preview: Preview) -> list[tuple[str, str, str]]:
    """What the model is given in an epoch of the training data: a label, then padded and packed."""
    padded = preview.padded
    return [
        (
            "passes through the model",
            f"{padded.batches:,} of {preview.batch_size:,} rows",
            f"{preview.packs:,} of up to {preview.capacity:,} tokens",
        ),
        ("tokens", f"{padded.tokens + padded.padding:,}", f"{padded.tokens:,}"),
        ("of them padding", f"{padded.padding:,} ({percent(padded.share)})", "none"),
    ]


def packing_note(preview: Preview) -> str:
    """Which of the two the run does. Packed, a step learns from the same rows: it is not one of fewer steps."""
    if preview.why_padded:
        return f"This run pads its rows: {preview.why_padded}."
    return (
        "This run packs its rows, if its model takes packs: a step learns the same. "
        "A beginning in common is counted in each."
    )


def named_rows(numbers: Sequence[int]) -> str:
    """ "rows 3, 17 and 29", with how many more there are after a dozen."""
    shown = [str(number) for number in numbers[:_ROWS_NAMED]]
    more = len(numbers) - len(shown)
    if more:
        return f"rows {', '.join(shown)} and {more:,} more"
    return f"row {shown[0]}" if len(shown) == 1 else f"rows {', '.join(shown[:-1])} and {shown[-1]}"


def percent(share: float) -> str:
    """One decimal; never 0.0% of something, nor 100.0% of less than everything."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}"


def sample_line(sample: Sample, preview: Preview) -> str:
    """The line above a sample."""
    text = f"row {sample.number} of {preview.splits[0].rows + preview.splits[0].dropped}: "
    text += f"{sample.tokens:,} tokens, {sample.learnt:,} learnt"
    if sample.uncut > sample.tokens:
        text += f"; cut from {sample.uncut:,} at max_length, so its end is not learnt"
    if not sample.learnt:
        text += "; left out of training"
    return text
