"""The first A and B of one module, as the methods' papers say. Loaded only with torch.

Each function gives A₀ (r, in) and B₀ (out, r), fp32; where B₀ is not zero, the layer takes B₀A₀ off again: see offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: γ of LoRA-GA: its authors' value.
STABLE_GAMMA = 16
_PASSES = 4


@dataclass(frozen=True)
class Start:
    """`up` is None where B starts as zero."""

    down: Tensor
    up: Tensor | None = None


def pissa(weight: Tensor, rank: int, scaling: float, passes: int | None, seed: int) -> Start:
    """Principal singular values and vectors: scaling * B₀A₀ is the best approximation of `weight` of this rank
    (Meng et al. 2024, arXiv:2404.02948).

    Args:
        weight: (out, in).
        passes: of the approximate decomposition; None decomposes exactly.
    """
    if passes is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = leading(weight, rank, seed, passes)
    root = (values[:rank] / scaling).sqrt()
    return Start(root[:, None] * right[:rank], left[:, :rank] * root)


def olora(weight: Tensor, rank: int) -> Start:
    """B₀ and A₀ are the first columns of Q and rows of R, where QR is `weight`, (out, in) (Büyükakyüz 2024,
    arXiv:2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return Start(r[:rank].contiguous(), q[:, :rank].contiguous())


def lora_ga(gradient: Tensor, rank: int, seed: int) -> Start:
    """A₀ from the first singular vectors of the weight's `gradient`, (out, in), on the side of the input, B₀ from the
    next on the side of the output, both scaled as stably as the width asks (Wang et al. 2024, arXiv:2407.05000)."""
    left, _, right = leading(gradient, 2 * rank, seed)
    scale = gradient.shape[0] ** 0.25 / STABLE_GAMMA**0.5
    return Start(scale * right[:rank], scale * left[:, rank : 2 * rank])


def eva(second_moment: Tensor, rank: int, seed: int) -> Start:
    """A from the directions in which the module's inputs are largest, B zero (Paischer et al. 2024, arXiv:2410.07170).

    Args:
        second_moment: the sum of xxᵀ over the inputs, (in, in); its eigenvectors are their right singular vectors.
    """
    return Start(leading(second_moment, rank, seed)[2].contiguous())


def leading(matrix: Tensor, count: int, seed: int, passes: int = _PASSES) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triplets (out, count), (count,), (count, in), by block power iteration on twice as
    many directions (Halko et al. 2011, arXiv:0909.4061). It draws from no generator but its own."""
    width = min(2 * count, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)).Q
    for _ in range(passes):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :count], values[:count], right[:count]
