"""Training batches outside the training loop, for adapters that initialise from data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def training_batches(
    train: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Batches in the order of the data, on the device: input_ids, attention_mask and labels, each (B, T)."""
    from ..data.collate import Collator

    pad: Any = tokenizer.pad_token_id
    collate = Collator(pad)
    for start in range(0, len(train), batch_size):
        rows = [train[index] for index in range(start, min(start + batch_size, len(train)))]
        yield {name: tensor.to(device) for name, tensor in collate(rows).items()}
