"""Which rows are held out for evaluation: the copies of a row are never parted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import DataError

from .audit.rows import keys

if TYPE_CHECKING:
    from datasets import Dataset


def choose_held_out(rows: Dataset, order: Any, wanted: int, label: str) -> Any:
    """Truth values (N,): whether a row is held out.

    Rows are copies of each other where the audit takes them for the same: white space and case aside. They are taken
    in the drawn order, each with all its copies, where these still fit, so that it may be a few rows fewer than
    wanted; it is more where every set is larger, and then it is the smallest one. Takes time of N log N.

    Args:
        order: a permutation of the row numbers, (N,).
        wanted: rows to hold out, from 1 to N - 1.
        label: the source's name, for errors.

    Raises:
        DataError: all rows are copies of one.
    """
    import numpy as np

    copies = _copies(rows)
    sizes = np.bincount(copies)
    if len(sizes) == 1:
        raise DataError(
            f"{label} has nothing to hold out: its {len(order)} rows are all the same",
            why="copies of a row stay on one side of validation_split, since the evaluation is to show rows that are "
            "not trained on",
            fix="give rows that differ, or set validation_split to 0",
        )
    _, first = np.unique(copies[order], return_index=True)
    drawn = np.argsort(first)  # the sets, each where its first row was drawn
    taken = _fitting(sizes[drawn].tolist(), wanted)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[drawn[taken]] = True
    return chosen[copies]


def _copies(rows: Dataset) -> Any:
    """The number of the set of copies that each row belongs to, (N,), from 0 on."""
    import numpy as np

    halves = np.fromiter((whole for whole, _ in keys(rows)), dtype="S16", count=len(rows)).view("u8").reshape(-1, 2)
    by_key = np.lexsort(halves.T)
    begins = (np.diff(halves[by_key], axis=0) != 0).any(axis=1)
    numbers = np.empty(len(rows), dtype=np.int64)
    numbers[by_key] = np.concatenate([[0], np.cumsum(begins)])
    return numbers


def _fitting(sizes: Sequence[int], wanted: int) -> list[int]:
    """Places of the sets to take in turn, each that still fits; the smallest one where none does. Never all."""
    left, taken = wanted, []
    for place, size in enumerate(sizes):
        if size <= left:
            taken.append(place)
            left -= size
    return taken or [min(range(len(sizes)), key=sizes.__getitem__)]
