"""Adds tokens of the user's own to a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Adds `tokens` to the vocabulary and returns their ids, in the same order.

    They are ordinary tokens, not special ones: `skip_special_tokens` does not hide them from generated text.

    Raises:
        ModelError: a token is empty, appears twice, or is already one token of the vocabulary. Nothing was added then.
    """
    from tokenizers import AddedToken

    _check(tokenizer, tokens)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_ids: Sequence[int]) -> None:
    """Gives each id of `add_to_tokenizer` a row in the embedding and the output head.

    A new row starts as the mean of the rows before the first new id (Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models", 2021, without its noise), so that it is the same in every run. A tied head stays tied.
    Rows that the model already has to spare are used before the embedding grows.

    Raises:
        ModelError: without the new ids, the tokenizer already has more tokens than the model has rows.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    used = min(new_ids, default=len(tokenizer))
    if used > rows:
        raise ModelError(
            f"the tokenizer has {used:,} tokens and the model has rows for {rows:,}",
            why="tokenizer and model do not belong together",
            fix="use the tokenizer that came with the model",
        )
    if not new_ids:
        return
    needed = max(new_ids) + 1
    if needed > rows:
        # It draws random rows, which are overwritten below: keep the run's own random numbers as they were.
        device = embedding.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.resize_token_embeddings(needed, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        _set_to_mean(embedding.weight, used, new_ids)
        if head is not None and head.weight is not embedding.weight:
            _set_to_mean(head.weight, used, new_ids)
        if getattr(head, "bias", None) is not None:
            _set_to_mean(head.bias, used, new_ids)


def _check(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    seen: set[str] = set()
    for token in tokens:
        if not token.strip():
            raise ModelError(
                f"new_tokens holds an empty token {token!r}",
                why="a token has to show in the text",
                fix="remove it, or write the text that it stands for",
            )
        if token in seen:
            raise ModelError(f"new_tokens holds {token!r} twice", fix="write each token once")
        seen.add(token)
        ids = tokenizer.encode(token, add_special_tokens=False)
        if token in vocabulary or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
            raise ModelError(
                f"new_tokens holds {token!r}, which the tokenizer already knows as one token",
                why=f"its id is {vocabulary.get(token, ids[0] if ids else None)}",
                fix="remove it from new_tokens: the model can already read and write it",
            )


def _set_to_mean(weight: torch.Tensor, used: int, ids: Sequence[int]) -> None:
    """Sets rows `ids` of `weight` (rows, ...) to the mean of its first `used` rows, summed in float32."""
    weight[list(ids)] = weight[:used].float().mean(dim=0).to(weight.dtype)
