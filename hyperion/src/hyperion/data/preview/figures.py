"""Figures of tokenized data: lengths, padding, and what packing would do. Pure functions of row lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...acceleration.documents import shared_out

_MOST_BARS = 20


@dataclass(frozen=True, slots=True)
class Bar:
    """Rows of `first` to `last` tokens, both included; `cut` when these are more than max_length."""

    first: int
    last: int
    rows: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Padding:
    """What a pass over the data reads: `tokens` of the rows, and `padding` that fills the batches up."""

    batches: int
    tokens: int
    padding: int

    @property
    def share(self) -> float:
        """Padding of all that is read."""
        return self.padding / max(1, self.tokens + self.padding)


def histogram(lengths: Sequence[int], max_length: int) -> list[Bar]:
    """Bars of equal width, empty ones included, at most about 20.

    Args:
        lengths: tokens of each row before any cut.
        max_length: a border between two bars whenever a row is longer.
    """
    if not lengths:
        return []
    longest, shortest = max(lengths), min(lengths)
    width = _round_width((longest - shortest + 1) / _MOST_BARS)
    offset = max_length % width if longest > max_length else 0
    counts: dict[int, int] = {}
    for length in lengths:
        counts[_bar(length, width, offset)] = counts.get(_bar(length, width, offset), 0) + 1
    bars = []
    for number in range(_bar(shortest, width, offset), _bar(longest, width, offset) + 1):
        last = number * width + offset
        first = max(0, last - width + 1)
        bars.append(Bar(first, last, counts.get(number, 0), cut=first > max_length))
    return bars


def _bar(length: int, width: int, offset: int) -> int:
    return -((offset - length) // width)


def _round_width(least: float) -> int:
    """1, 2 or 5 times a power of ten, and at least `least`."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= least:
                return step * scale
        scale *= 10


def percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that `percent` of the ascending values do not exceed (the nearest-rank method)."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def padding(lengths: Sequence[int], order: Iterable[int], batch_size: int, *, drop_last: bool = False) -> Padding:
    """One pass in the given order of rows; every batch is padded to its longest row."""
    batches = tokens = read = 0
    batch: list[int] = []

    def close() -> None:
        nonlocal batches, tokens, read
        batches, tokens, read = batches + 1, tokens + sum(batch), read + max(batch) * len(batch)
        batch.clear()

    for row in order:
        batch.append(lengths[row])
        if len(batch) == batch_size:
            close()
    if batch and not drop_last:
        close()
    return Padding(batches, tokens, read - tokens)


def packs(lengths: Sequence[int], order: Iterable[int], rows_a_step: int, capacity: int) -> int:
    """Packs of at most `capacity` tokens in one pass: those of each optimizer step are made of its own rows.

    What all rows of a pack begin with counts in each of them here, though it is computed once.
    """
    rows = [lengths[row] for row in order]
    return sum(
        len(shared_out(rows[start : start + rows_a_step], capacity)) for start in range(0, len(rows), rows_a_step)
    )
