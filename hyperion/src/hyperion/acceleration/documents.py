"""Rows of different lengths laid end to end: no padding, and none of them sees another.

The rows of one optimizer step are shared out over packs of at most so many tokens, so that a step learns from exactly
the rows that it would learn from without packing: only the shape of the computation changes.

Rows often begin alike: with a system prompt, or a template's first words. What all rows of a pack begin with, and none
of them learns, stands in the pack once, and every document attends to it; its states are the same in each, and its
gradient is the sum of what each would give it. So a long system prompt is computed once a pack, not once a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.encoding import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

#: The keyword argument under which a model's attention layers find `Documents`.
DOCUMENTS = "documents"


# Fewer tokens in common are not worth the care.
_LEAST_SHARED = 16
# Tokens of a pack on a CPU: it gains nothing from more, and its memory grows with them.
_USUAL_ON_CPU = 1024


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the rows of a pack begin and end: first `shared` tokens that all of them begin with, then what each has of
    its own, of `lengths` tokens, in order."""

    lengths: tuple[int, ...]
    shared: int = 0

    @property
    def size(self) -> int:
        """Tokens of the pack."""
        return self.shared + sum(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the rows: those that they share count in each."""
        return self.shared * len(self.lengths) + sum(self.lengths)

    def spans(self) -> list[tuple[int, int]]:
        """(first token, one past the last) of what each has of its own."""
        spans, start = [], self.shared
        for length in self.lengths:
            spans.append((start, start + length))
            start += length
        return spans

    def numbers(self, positions: Tensor) -> Tensor:
        """Of the documents that these positions of the pack, (N,) and none of them shared, stand in, from 0."""
        import torch

        ends = torch.tensor(self.lengths, device=positions.device).cumsum(0) + self.shared
        return torch.searchsorted(ends, positions, right=True)


def common_beginning(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that all rows begin with, and after which none of them has learnt anything yet; 0 where they are few.

    The last of them predicts each row's next token, so that one must not be learnt either.
    """
    if len(rows) < 2:
        return 0
    first = rows[0]["input_ids"]
    most = max(0, min(_unlearnt(row["labels"]) for row in rows) - 1)
    for row in rows[1:]:
        ids = row["input_ids"]
        most = min(most, len(ids) - 1)
        if list(ids[:most]) != list(first[:most]):
            most = next(place for place in range(most) if ids[place] != first[place])
    return most if most >= _LEAST_SHARED else 0


def _unlearnt(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def pack_capacity(asked: int | None, longest: int, batch_size: int, device: str) -> int:
    """Tokens of a pack, where the longest row has so many.

    Args:
        asked: `pack_length`; None leaves it to the device. A GPU wants what a padded batch of `batch_size` would hold.
    """
    return max(longest, asked or (_USUAL_ON_CPU if device == "cpu" else longest * batch_size))


def shared_out(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of rows, as indices, by best fit decreasing (Johnson 1973): each row goes where it leaves least room.

    Ties go to the earlier row and the earlier pack, so that the same lengths always give the same packs. A row that
    is longer than `capacity` tokens has a pack to itself.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [number for number, left in enumerate(room) if left >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda number: room[number])
        else:
            best = len(packs)
            packs.append([])
            room.append(capacity)
        packs[best].append(row)
        room[best] -= lengths[row]
    return packs


def packed(rows: Sequence[Mapping[str, Any]], *, sharing: bool = True) -> dict[str, Any]:
    """Rows with `input_ids` and `labels` to one batch of one row: input_ids, position_ids, labels, each (1, T) int64,
    and `documents`.

    Positions are those that each token has in its row, and a row's first token has no label: nothing before it
    predicts it. With `sharing`, what all rows begin with stands there once.
    """
    import torch

    shared = common_beginning(rows) if sharing else 0
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    labels = [torch.as_tensor(row["labels"], dtype=torch.long).clone() for row in rows]
    for own in labels:
        own[:1] = IGNORED
    positions = [torch.arange(len(own)) for own in ids]

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([parts[0][:shared], *(part[shared:] for part in parts)])[None]

    return {
        "input_ids": joined(ids),
        "position_ids": joined(positions),
        "labels": joined(labels),
        DOCUMENTS: Documents(tuple(len(own) - shared for own in ids), shared),
    }
