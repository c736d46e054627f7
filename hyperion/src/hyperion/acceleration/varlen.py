"""Causal attention within each document of a pack, all documents in one call of a GPU's FlashAttention kernel.

torch's `varlen_attn` (FlashAttention-2, Dao 2023, arXiv:2307.08691) takes rows of different lengths laid end to end.
Where a row has fewer queries than keys, its last query sees its last key, as FlashAttention has it since its version
2.1: so what all documents begin with stands before the keys of each.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .documents import Documents

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

_TYPES = (torch.float16, torch.bfloat16)
_WIDEST = 256  # of a head
_CLOSE = 0.02  # of the norm: a 16-bit type rounds by less, and another mask makes more of a difference


def served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes such states (1, heads, T, D), and was seen to give what torch's own attention does."""
    if varlen_attn is None or query.device.type != "cuda" or query.dtype not in _TYPES:
        return False
    width = query.shape[-1]
    if width % 8 or width > _WIDEST or value.shape[-1] != width:
        return False
    return _agrees(query.device, query.dtype, width, query.shape[1] // key.shape[1])


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int
) -> Tensor:
    """query (1, H, T, D), key and value (1, G, T, D); gives (1, T, H, D)."""
    q, k, v = (whole[0].transpose(0, 1) for whole in (query, key, value))
    own, seen = list(documents.lengths), list(documents.lengths)
    if documents.shared:
        seen = [documents.shared, *(documents.shared + length for length in own)]
        own = [documents.shared, *own]
        places = _places(documents, query.device)
        k, v = k[places], v[places]
    longest = max(seen)
    out = varlen_attn(
        q, k, v, _ends(tuple(own), query.device), _ends(tuple(seen), query.device), max(own), longest,
        scale=scale, window_size=(window - 1 if window < longest else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[None]


# Every layer of a pass asks for the same. What is kept may be made while evaluating, and used in training.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _places(documents: Documents, device: torch.device) -> Tensor:
    """Of the keys that stand in a pack once: where each of them is read, for what all begin with and each document."""
    beginning = range(documents.shared)
    found = [*beginning]
    for start, end in documents.spans():
        found += [*beginning, *range(start, end)]
    return torch.tensor(found, device=device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
@torch.enable_grad()
def _agrees(device: torch.device, dtype: torch.dtype, width: int, group: int) -> bool:
    """On a few tokens, values and gradients: with and without a beginning in common and a window. A kernel that is
    not there for this GPU, or that counts otherwise, is not used."""
    from .attention import by_torch

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for documents, window in ((Documents((5, 40)), 64), (Documents((3, 20), 9), 64), (Documents((30, 7), 4), 8)):
        q, k, v = (drawn(1, heads, documents.size, width).requires_grad_() for heads in (2 * group, 2, 2))
        towards = drawn(1, documents.size, 2 * group, width)
        try:
            pairs = [
                [out, *torch.autograd.grad(out, (q, k, v), towards)]
                for out in (
                    varlen_attention(q, k, v, documents, width**-0.5, window),
                    by_torch(q, k, v, documents, width**-0.5, window, 0.0),
                )
            ]
        except (RuntimeError, TypeError, ValueError):  # an older torch has other arguments
            return False
        if not all(_apart(*pair) <= _CLOSE for pair in zip(*pairs, strict=True)):  # not of NaN
            return False
    return True


def _apart(mine: Tensor, right: Tensor) -> float:
    mine, right = mine.detach().float(), right.detach().float()
    return float((mine - right).norm() / right.norm())
