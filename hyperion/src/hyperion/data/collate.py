"""Rows of tokens to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .encoding import IGNORED

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads on the right to the longest row of the batch.

    Padding is told by each row's length, never by token id: for many models the padding token is the end-of-sequence
    token, which is to be read and learnt.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows with `input_ids` and `labels` to int64 tensors (B, T): input_ids, attention_mask, labels (-100 where
        nothing is learnt)."""
        import torch

        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), max(lengths))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
        }
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            batch["input_ids"][number, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][number, :length] = 1
            batch["labels"][number, :length] = torch.as_tensor(row["labels"])
        return batch
