"""Attention within documents is plain attention of each document alone, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hyperion.acceleration.attention import UnsupportedAttentionError, document_attention
from hyperion.acceleration.documents import Documents

# (documents, window): within a block, over several blocks, longer than what is kept, and with a sliding window
CASES = {
    "short": ((3, 1, 40), None),
    "blocks": ((128, 300, 129), None),
    "recomputed": ((700, 5), None),
    "window": ((40, 300, 600), 50),
    "window of a block": ((257,), 128),
}


def states(lengths, dtype=torch.float64, heads=6, groups=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(1, count, sum(lengths), width, generator=generator, dtype=torch.float64) * 1.5)
        .to(dtype)
        .requires_grad_()
        for count in (heads, groups, groups)
    ]


def plain(query, key, value, lengths, window, scale):
    found, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        keys, values = (whole[:, :, part].repeat_interleave(3, 1) for whole in (key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length))
        found.append(scaled_dot_product_attention(query[:, :, part], keys, values, attn_mask=seen, scale=scale))
        start += length
    return torch.cat(found, 2).transpose(1, 2)


def rows_of(whole, lengths, shared):
    """Each document's tokens in a pack, with those that all begin with."""
    start = shared
    for length in lengths:
        yield torch.cat([whole[:, :, :shared], whole[:, :, start : start + length]], 2)
        start += length


def expected(query, key, value, lengths, shared, window):
    """Plain attention of each document by itself, and of what all begin with."""
    found = [plain(*(whole[:, :, :shared] for whole in (query, key, value)), (shared,), window, 0.3)] if shared else []
    for parts in zip(*(rows_of(whole, lengths, shared) for whole in (query, key, value)), strict=True):
        found.append(plain(*parts, (parts[0].shape[2],), window, 0.3)[:, shared:])
    return torch.cat(found, 1)


def both(lengths, window, dtype, shared=0, dropout=0.0, **changes):
    mine = states((shared, *lengths), dtype, **changes)
    own = [part.detach().double().requires_grad_() for part in mine]
    out, _ = document_attention(
        torch.nn.Identity(), *mine, None, documents=Documents(lengths, shared), scaling=0.3, sliding_window=window,
        dropout=dropout,
    )  # fmt: skip
    right = expected(*own, lengths, shared, window)
    towards = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)
    out.backward(towards)
    right.backward(towards.double())
    return [(out.detach(), right.detach()), *((m.grad, o.grad) for m, o in zip(mine, own, strict=True))]


def distance(mine, own):
    return float((mine.double() - own).norm() / own.norm())


@pytest.mark.parametrize("lengths, window", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_each_document_alone(lengths, window):
    for seed in (0, 1, 2):
        assert max(distance(*pair) for pair in both(lengths, window, torch.float64, seed=seed)) < 1e-12
    assert max(distance(*pair) for pair in both(lengths, window, torch.float32)) < 2e-6


@pytest.mark.parametrize("shared", [1, 30, 200])
@pytest.mark.parametrize("lengths, window", CASES.values(), ids=CASES)
def test_what_all_begin_with_is_seen_by_each_document(lengths, window, shared):
    assert max(distance(*pair) for pair in both(lengths, window, torch.float64, shared=shared)) < 1e-12


@pytest.mark.parametrize("shared", [0, 30])
@pytest.mark.parametrize("lengths, window", CASES.values(), ids=CASES)
def test_torch_s_kernels_are_given_the_same_documents(lengths, window, shared):
    """As on a GPU, and where attention has dropout: here one so small that it drops nothing."""
    assert max(distance(*pair) for pair in both(lengths, window, torch.float64, shared=shared, dropout=1e-12)) < 1e-9


@pytest.mark.parametrize("lengths, window", CASES.values(), ids=CASES)
def test_bfloat16_is_as_good_as_torch_s_own(lengths, window):
    ours = [distance(*pair) for pair in both(lengths, window, torch.bfloat16)]
    own = states(lengths)
    kernel = [part.detach().bfloat16().requires_grad_() for part in own]
    exact = [part.detach().double().requires_grad_() for part in kernel]
    towards = torch.randn(1, sum(lengths), 6, 8, generator=torch.Generator().manual_seed(9)).bfloat16()
    plain(*kernel, lengths, window, 0.3).backward(towards)
    plain(*exact, lengths, window, 0.3).backward(towards.double())
    theirs = max(distance(k.grad, e.grad) for k, e in zip(kernel, exact, strict=True))
    assert max(ours) < max(2 * theirs, 5e-3)


def test_another_document_changes_no_bit():
    lengths = (150, 70)
    outputs, gradients = [], []
    for seed in (0, 1):
        given = states(lengths, torch.float32, seed=0)
        with torch.no_grad():
            for part in given:
                part[:, :, :150] = torch.randn(part[:, :, :150].shape, generator=torch.Generator().manual_seed(seed))
        out, _ = document_attention(torch.nn.Identity(), *given, None, documents=Documents(lengths))
        out[:, 150:].square().sum().backward()
        outputs.append(out[:, 150:].detach())
        gradients.append([part.grad for part in given])
    assert torch.equal(*outputs)
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
        assert not first[:, :, :150].any()
        assert first[:, :, 150:].any()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"softcap": 30.0}, "softcap"),
        ({"documents": None}, "documents"),
        ({"documents": Documents((3,))}, "one by one"),
    ],
)
def test_what_is_not_computed_here_is_refused(changes, said):
    with pytest.raises(UnsupportedAttentionError, match=said):
        document_attention(
            torch.nn.Identity(), *states((4,)), None, **{"documents": Documents((4,)), "scaling": 1.0, **changes}
        )
