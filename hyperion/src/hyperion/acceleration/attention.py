"""Causal attention within each document of a pack, registered with transformers' attention interface.

On a CPU it is computed block by block, with the gradient written out: scores and softmax in float32 whatever the
model's type, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135), but with the probabilities of short documents
kept rather than computed again. torch's own kernel takes two to three times as long there, most of it in its backward
pass. On a GPU torch's kernels are the fast ones, and are used: that for rows of different lengths (varlen.py) where it
serves, else one document after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from .documents import Documents
from .varlen import served, varlen_attention

#: The name under which transformers knows it (`attn_implementation`).
NAME = "hyperion_documents"

# Queries that are looked at together: smaller blocks skip more of what causality hides, larger ones multiply faster.
_BLOCK = 128
# Tokens of a document up to which probabilities are kept for the backward pass; their memory grows with the square.
_KEPT = 512
# What an architecture may ask of attention that is not computed here.
_NOT_HERE = ("softcap", "s_aux", "position_bias", "head_mask", "cache")


class UnsupportedAttentionError(ValueError):
    """An architecture's attention does something that attention within documents does not."""


def document_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query (1, H, T, D), key and value (1, G, T, D) with H a multiple of G; gives
    (1, T, H, D).

    Raises:
        UnsupportedAttentionError: the architecture asks for what is not computed here.
    """
    if asked := [name for name in _NOT_HERE if kwargs.get(name) is not None]:
        raise UnsupportedAttentionError(f"its attention uses {', '.join(asked)}")
    if documents is None or attention_mask is not None:
        raise UnsupportedAttentionError("it does not hand the documents of a pack on to its attention layers")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2] or documents.size != query.shape[2]:
        raise UnsupportedAttentionError("its attention layers do not see the tokens of the pack one by one")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or query.shape[2]
    if query.device.type == "cpu" and not dropout:
        return _BlockedAttention.apply(query, key, value, documents, scale, window), None
    if not dropout and served(query, key, value):
        return varlen_attention(query, key, value, documents, scale, window), None
    return by_torch(query, key, value, documents, scale, window, dropout), None


def register() -> None:
    """Make `NAME` known to transformers; it then builds no mask, for there is none to build."""
    AttentionInterface.register(NAME, document_attention)


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int, dropout: float
) -> Tensor:
    """One document after another by torch's `scaled_dot_product_attention`; shapes as of `document_attention`."""
    group = query.shape[1] // key.shape[1]
    found = []
    for part in _parts(documents):
        keys, values = (part.seen_of(whole[0])[None].repeat_interleave(group, 1) for whole in (key, value))
        mask = None
        if part.shared or part.end - part.start > window:
            length = part.end - part.start
            mask = _distant(length, part.shared + length, part.shared, window, query.device).logical_not()
        found.append(
            scaled_dot_product_attention(
                query[:, :, part.start : part.end], keys, values, attn_mask=mask, dropout_p=dropout,
                is_causal=mask is None, scale=scale,
            )
        )  # fmt: skip
    return torch.cat(found, 2).transpose(1, 2)


class _BlockedAttention(torch.autograd.Function):
    """Layouts: queries (G, T*R, D) for R heads a key head, so that a block of tokens is one run of rows; keys and
    values (G, T, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int
    ) -> Tensor:
        groups, tokens, width = key.shape[1:]
        share = query.shape[1] // groups
        q = query[0].view(groups, share, tokens, width).transpose(1, 2).reshape(groups, tokens * share, width)
        k, v = key[0].contiguous(), value[0].contiguous()
        wide_q, wide_k = _wide(q), _wide(k)
        out = torch.empty_like(q)
        kept = []
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(documents):
                keys, values = part.seen_of(wide_k), part.seen_of(v)
                for block in part.blocks(window, share):
                    weights = _weights(wide_q, keys, block, scale, window).to(v.dtype)
                    out[:, block.rows] = weights @ values[:, block.seen]
                    if part.length <= _KEPT:
                        kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.settings = (documents, scale, window, share)
        return out.view(groups, tokens, share, width).permute(1, 0, 2, 3).reshape(1, tokens, groups * share, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        documents, scale, window, share = ctx.settings
        groups, tokens, width = k.shape
        out = gradient[0].view(tokens, groups, share, width).permute(1, 0, 2, 3).reshape(q.shape)
        to_q = torch.empty_like(q)
        # several blocks add to one key's gradient: in float32 at least, or rounding would pile up
        to_k, to_v = (torch.zeros_like(_wide(whole)) for whole in (k, v))
        probabilities = iter(kept)
        for part in _parts(documents):
            keys, values = part.seen_of(k), part.seen_of(v)
            recomputed = (_wide(q), _wide(keys)) if part.length > _KEPT else None
            to_keys, to_values = (torch.zeros_like(_wide(seen)) for seen in (keys, values))
            for block in part.blocks(window, share):
                if recomputed is None:
                    weights = next(probabilities)
                else:
                    weights = _weights(*recomputed, block, scale, window).to(v.dtype)
                rows, seen = block.rows, block.seen
                to_weights = out[:, rows] @ values[:, seen].transpose(1, 2)
                to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(scale)
                to_q[:, rows] = to_scores @ keys[:, seen]
                to_keys[:, seen] += to_scores.transpose(1, 2) @ q[:, rows]
                to_values[:, seen] += weights.transpose(1, 2) @ out[:, rows]
            part.add_to(to_k, to_keys)
            part.add_to(to_v, to_values)
        to_query = to_q.view(groups, tokens, share, width).transpose(1, 2).reshape(1, groups * share, tokens, width)
        return to_query, to_k.to(k.dtype)[None], to_v.to(v.dtype)[None], None, None, None


@dataclass(frozen=True, slots=True)
class _Part:
    """Queries `start` to `end` of a pack, which see its first `shared` tokens and themselves, in this order."""

    start: int
    end: int
    shared: int

    @property
    def length(self) -> int:
        return self.shared + self.end - self.start

    def seen_of(self, whole: Tensor) -> Tensor:
        """What the part sees of (G, T, D): (G, length, D)."""
        own = whole[:, self.start : self.end]
        return torch.cat([whole[:, : self.shared], own], 1) if self.shared else own

    def add_to(self, whole: Tensor, seen: Tensor) -> None:
        whole[:, : self.shared] += seen[:, : self.shared]
        whole[:, self.start : self.end] += seen[:, self.shared :]

    def blocks(self, window: int, share: int) -> list[_Block]:
        found = []
        for first in range(self.start, self.end, _BLOCK):
            end = min(first + _BLOCK, self.end)
            behind = self.shared + first - self.start
            rows = slice(first * share, end * share)
            found.append(_Block(rows, end - first, slice(max(0, behind - window + 1), behind + end - first)))
        return found


@dataclass(frozen=True, slots=True)
class _Block:
    """Some `queries`, `rows` of the layout, and the keys that they see, of those that their part sees."""

    rows: slice
    queries: int
    seen: slice


def _parts(documents: Documents) -> list[_Part]:
    first = [_Part(0, documents.shared, 0)] if documents.shared else []
    return first + [_Part(start, end, documents.shared) for start, end in documents.spans()]


def _weights(q: Tensor, keys: Tensor, block: _Block, scale: float, window: int) -> Tensor:
    """Softmax of the scores of one block: (G, rows, keys)."""
    scores = torch.bmm(q[:, block.rows], keys[:, block.seen].transpose(1, 2)).mul_(scale)
    length = scores.shape[2]
    by_token = scores.view(scores.shape[0], block.queries, -1, length)
    # only the last keys can lie behind a query, and only with a window the first ones too far before it
    looked_at = block.queries if length <= window else length
    hidden = _hidden(block.queries, looked_at, looked_at - block.queries, window, q.device)
    by_token[..., length - looked_at :].masked_fill_(hidden[:, None, :], float("-inf"))
    return torch.softmax(scores, -1)


def _distant(queries: int, keys: int, before: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys): which keys a query must not see; the first query stands `before` tokens behind the first key."""
    distance = before + torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance < 0) | (distance >= window)


# a block is small, a run has few shapes of them, and every layer asks for them
_hidden = lru_cache(maxsize=64)(_distant)


def _wide(given: Tensor) -> Tensor:
    return given.float() if given.dtype in (torch.bfloat16, torch.float16) else given
