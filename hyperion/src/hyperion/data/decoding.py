"""Tokens to text, to the letter: nothing skipped, nothing tidied up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of all of them."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_between(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, stop: int) -> str:
    """What the decoded row grows by from `start` to `stop`: many decoders drop a space at the beginning of a text.

    Where the row's earlier text changes with it, as a character's bytes may end behind `start`, the tokens from `start`
    to `stop` stand for themselves.
    """
    before, through = decode(tokenizer, ids[:start]), decode(tokenizer, ids[:stop])
    return through[len(before) :] if through.startswith(before) else decode(tokenizer, ids[start:stop])
