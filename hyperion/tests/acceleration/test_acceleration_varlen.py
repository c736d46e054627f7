"""What is given to a GPU's kernel for rows of different lengths: it is stood in for here by plain attention of each
row, as its documentation has it. On a GPU the kernel itself answers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hyperion.acceleration import varlen
from hyperion.acceleration.attention import by_torch, document_attention
from hyperion.acceleration.documents import Documents

CASES = {
    "documents": (Documents((3, 1, 40)), 64),
    "one": (Documents((17,)), 17),
    "window": (Documents((40, 9, 60)), 8),
    "all begin alike": (Documents((3, 20), 9), 64),
    "all begin alike, window": (Documents((30, 7), 4), 8),
}


def rows_apart(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """The kernel's meaning (torch.nn.attention.varlen): (T, heads, D), rows by their ends, the causal mask aligned to
    the last query and key, and `window_size[0]` keys to the left."""
    left, right = window_size
    assert right == 0
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    found = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        behind = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        mask = (behind >= 0) & (behind <= (left if left >= 0 else d))
        row = (whole.transpose(0, 1)[None] for whole in (q[a:b], k[c:d], v[c:d]))
        found.append(scaled_dot_product_attention(*row, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(found, 1).transpose(0, 1)


def states(documents, groups, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, documents.size, 8, generator=generator).to(device, dtype).requires_grad_()
        for heads in (6, groups, groups)
    ]


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("documents, window", CASES.values(), ids=CASES)
def test_the_kernel_is_given_each_document_with_what_it_sees(documents, window, groups, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", rows_apart)
    given = states(documents, groups)
    towards = torch.randn(1, documents.size, 6, 8, dtype=torch.float64)
    mine, right = (
        [out, *torch.autograd.grad(out, given, towards)]
        for out in (
            varlen.varlen_attention(*given, documents, 0.3, window),
            by_torch(*given, documents, 0.3, window, 0.0),
        )
    )
    for ours, theirs in zip(mine, right, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=1e-12)


def test_a_kernel_that_masks_otherwise_or_is_not_there_is_not_used(monkeypatch):
    def asked(kernel):
        varlen._agrees.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        return varlen._agrees(torch.device("cpu"), torch.bfloat16, 16, 3)

    def one_more_key(*given, window_size, **options):
        left, right = window_size
        return rows_apart(*given, window_size=(left + 1 if left > 0 else left, right), **options)

    def without_gradient(q, *given, **options):
        return rows_apart(q.detach(), *given, **options)

    def not_a_number(*given, **options):
        return rows_apart(*given, **options) * float("nan")

    def of_an_older_torch(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError("never called")

    def not_there(*given, **options):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    assert asked(rows_apart)
    with torch.inference_mode():
        assert asked(rows_apart), "evaluated first, training would go without it"
    assert not asked(one_more_key)
    assert not asked(without_gradient)
    assert not asked(not_there)
    assert not asked(not_a_number)
    assert not asked(of_an_older_torch)
    varlen._agrees.cache_clear()


def test_what_an_evaluation_keeps_can_be_trained_with(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", rows_apart)
    documents = Documents((5, 6), 4)
    varlen._ends.cache_clear()
    varlen._places.cache_clear()
    with torch.inference_mode():
        varlen.varlen_attention(*states(documents, 2), documents, 0.3, 99)
    given = states(documents, 2)
    varlen.varlen_attention(*given, documents, 0.3, 99).sum().backward()
    assert all(state.grad is not None and state.grad.isfinite().all() for state in given)


@pytest.mark.parametrize("documents, window", CASES.values(), ids=CASES)
def test_torch_takes_what_it_is_given(documents, window):
    """Its own operator, forward and backward, where it only reckons shapes and types."""
    given = [state.detach().to("meta").requires_grad_() for state in states(documents, 2, torch.bfloat16)]
    out = varlen.varlen_attention(*given, documents, 0.3, window)
    assert out.shape == (1, documents.size, 6, 8)
    gradients = torch.autograd.grad(out, given, torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [state.shape for state in given]


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("documents, window", CASES.values(), ids=CASES)
def test_on_a_gpu_it_is_used_and_agrees(documents, window, groups, monkeypatch):
    given = states(documents, groups, torch.bfloat16, "cuda")
    assert varlen.served(*given)
    mine, _ = document_attention(
        torch.nn.Identity(), *given, None, documents=documents, scaling=0.3, sliding_window=window
    )
    right = by_torch(*given, documents, 0.3, window, 0.0)
    assert float((mine - right).float().norm() / right.float().norm()) < 0.02
