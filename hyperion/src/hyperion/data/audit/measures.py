"""Numbers of every row, taken from its tokens and labels alone, a batch of Arrow at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # what torch's cross entropy leaves out: the convention itself, not our encoder's word for it
_ROWS_A_BATCH = 5_000


@dataclass(frozen=True, slots=True)
class Measures:
    """Arrays (N,), one number a row: int64 counts and ids, -1 where there is no such token.

    `uncut` is the row's length before max_length; `wrong` counts learnt positions whose label is not the token there;
    `ends` whether an end token is learnt, `has_end` whether one stands in the row at all, learnt or not.
    """

    length: Any
    uncut: Any
    supervised: Any
    wrong: Any
    first: Any
    second: Any
    last_learnt: Any
    ends: Any
    has_end: Any

    @property
    def rows(self) -> int:
        return len(self.length)


def measure(
    tokens: Dataset, ends: frozenset[int], max_length: int, advance: Callable[[int], None] = lambda done: None
) -> Measures:
    """Measures every row of `tokens` (columns input_ids, labels, and uncut where it is known).

    Args:
        ends: ids that end a sequence.
        max_length: without a column `uncut`, a row of this length counts as cut.
    """
    import numpy as np

    parts: list[tuple[Any, ...]] = []
    end_ids = np.fromiter(sorted(ends), dtype=np.int64, count=len(ends))
    columns = [name for name in ("input_ids", "labels", "uncut") if name in tokens.column_names]
    for batch in tokens.select_columns(columns).with_format("arrow").iter(_ROWS_A_BATCH):
        ids_column = batch["input_ids"].combine_chunks()
        length = ids_column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        ids = ids_column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        labels = batch["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        stop = np.cumsum(length)
        start = stop - length
        learnt = labels != IGNORED
        is_end = np.isin(ids, end_ids)

        def per_row(mask: Any, start: Any = start, stop: Any = stop) -> Any:
            counted = np.concatenate([[0], np.cumsum(mask)])
            return counted[stop] - counted[start]

        def at(where: Any, offset: int, ids: Any = ids, length: Any = length) -> Any:
            safe = np.minimum(where + offset, max(len(ids) - 1, 0))
            return np.where(length > offset, ids[safe], -1) if len(ids) else np.full(len(length), -1)

        position = np.where(learnt, np.arange(len(ids)), -1)
        latest = np.maximum.accumulate(position) if len(ids) else position
        found = latest[np.maximum(stop - 1, 0)] if len(ids) else np.full(len(length), -1)
        last = np.where((length > 0) & (found >= start), ids[np.maximum(found, 0)] if len(ids) else -1, -1)
        if "uncut" in columns:
            uncut = batch["uncut"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            uncut = length + (length >= max_length)
        parts.append((length, uncut, per_row(learnt), per_row(learnt & (labels != ids)), at(start, 0), at(start, 1),
                      last, per_row(is_end & learnt) > 0, per_row(is_end) > 0))  # fmt: skip
        advance(len(length))
    return Measures(*(np.concatenate(column) for column in zip(*parts, strict=True)))
