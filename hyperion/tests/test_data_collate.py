"""Padding to a batch."""

from __future__ import annotations

from hyperion.data.collate import Collator


def test_padding_is_on_the_right_and_told_by_length_not_by_token():
    rows = [
        {"input_ids": [5, 2], "labels": [-100, 2], "length": 2},  # ends in the padding token, which is to be learnt
        {"input_ids": [7, 8, 9, 2], "labels": [-100, -100, 9, 2], "length": 4},
    ]
    batch = Collator(pad_token_id=2)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 2, 2, 2], [7, 8, 9, 2]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, 2, -100, -100], [-100, -100, 9, 2]],
    }
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
