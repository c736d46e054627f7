"""Rows to what the model is given: packs of documents, or padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..acceleration.documents import common_beginning, packed, shared_out
from ..data.collate import Collator

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

#: What a model is given for one forward pass.
MicroBatch = Mapping[str, Any]


class RowBatch:
    """Rows as a data loader hands them on: nothing on the way to the engine looks into it."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows


@dataclass(frozen=True, slots=True)
class Batching:
    """How the rows of one optimizer step become micro-batches.

    Args:
        pad: makes a padded batch.
        capacity: tokens of a pack; None pads.
        sharing: what the rows of a pack begin with alike stands in it once.
    """

    pad: Collator
    capacity: int | None
    sharing: bool = True

    def __call__(self, batches: Sequence[RowBatch]) -> list[list[MicroBatch]]:
        """For each of the loader's batches a list of what the model is given, which may be empty: packs are made of
        the rows of all of them."""
        if self.capacity is None:
            return [[self.pad(batch.rows)] for batch in batches]
        rows = [row for batch in batches for row in batch.rows]
        shared = common_beginning(rows) if self.sharing else 0
        packs: list[MicroBatch] = [
            packed([rows[index] for index in chosen], sharing=self.sharing)
            for chosen in shared_out([len(row["input_ids"]) - shared for row in rows], self.capacity - shared)
        ]
        count = len(batches)
        return [packs[number * len(packs) // count : (number + 1) * len(packs) // count] for number in range(count)]


def training_batches(
    train: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Batches in the order of the data, on the device, for adapters that initialise from data: input_ids,
    attention_mask and labels, each (B, T)."""
    pad: Any = tokenizer.pad_token_id
    collate = Collator(pad)
    for start in range(0, len(train), batch_size):
        rows = [train[index] for index in range(start, min(start + batch_size, len(train)))]
        yield {name: tensor.to(device) for name, tensor in collate(rows).items()}
