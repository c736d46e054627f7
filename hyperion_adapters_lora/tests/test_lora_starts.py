"""The first matrices are what the papers say, on weights and data whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hyperion_core.context import NoProgress
from hyperion_core.testing.tiny import tiny_llama
from torch import Tensor, nn

from hyperion_adapters_lora import initialising, measuring, start


def matrix(out: int, into: int, seed: int = 0) -> Tensor:
    """Singular values 1, 0.7, 0.49, …"""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(out, out, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(into, into, generator=generator))
    size = min(out, into)
    return left[:, :size] @ torch.diag(0.7 ** torch.arange(size)) @ right[:, :size].T


def same_space(rows: Tensor, others: Tensor) -> None:
    """Two sets of r rows span the same directions."""
    first, second = torch.linalg.qr(rows.T).Q, torch.linalg.qr(others.T).Q
    torch.testing.assert_close(first @ first.T, second @ second.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes", [None, 4, 16])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_pissa_is_the_best_approximation_of_its_rank(shape: tuple[int, int], passes: int | None) -> None:
    weight = matrix(*shape)
    found = start.pissa(weight, 3, 0.25, passes, seed=1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = left[:, :3] @ torch.diag(values[:3]) @ right[:3]
    torch.testing.assert_close(0.25 * found.up @ found.down, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.up.norm(), found.down.norm())  # the values are shared out evenly


def test_olora_is_the_first_part_of_qr() -> None:
    weight = matrix(20, 12)
    found = start.olora(weight, 12)
    torch.testing.assert_close(found.up @ found.down, weight, rtol=1e-4, atol=1e-5)
    part = start.olora(weight, 3)
    torch.testing.assert_close(part.up.T @ part.up, torch.eye(3), rtol=1e-5, atol=1e-5)
    assert torch.equal(part.up, found.up[:, :3]) and torch.equal(part.down, found.down[:3])


def test_lora_ga_takes_the_first_directions_in_and_the_next_out() -> None:
    gradient = matrix(20, 12)
    found = start.lora_ga(gradient, 3, seed=1)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    scale = 20**0.25 / 16**0.5
    same_space(found.down, right[:3])
    same_space(found.up.T, left[:, 3:6].T)
    torch.testing.assert_close(found.down @ found.down.T, scale**2 * torch.eye(3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.up.T @ found.up, scale**2 * torch.eye(3), rtol=1e-4, atol=1e-5)


def batches(**changed: Any) -> list[dict[str, Tensor]]:
    """Two batches of three rows, padded on the right; the first third of each row is not learnt."""
    found = []
    for number in range(2):
        ids = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :4] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels, **changed})
    return found


@pytest.mark.parametrize("at_once", [measuring.AT_ONCE, 5000])
def test_gradients_are_those_of_autograd_whatever_is_held_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "AT_ONCE", at_once)
    model = tiny_llama(attention_bias=True)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    modules = {name: model.get_submodule(name) for name in names}
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    before = [p.requires_grad for p in model.parameters()]
    rows = measuring.read_rows(batches(), 5)
    found = dict(measuring.gradients(model, modules, shapes, rows, NoProgress()))
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    for batch, count in zip(batches(), (3, 2), strict=True):  # five rows were asked for
        wanted = {key: value[:count] for key, value in batch.items()}
        learnt = (wanted["labels"][:, 1:] != -100).sum()
        (model(**wanted).loss * learnt).backward()
    for name, module in modules.items():
        torch.testing.assert_close(found[name], module.weight.grad, rtol=1e-4, atol=1e-5)


def test_second_moments_are_of_what_goes_in_at_learnt_tokens() -> None:
    model = tiny_llama()
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    expected = torch.zeros(48, 48)
    for batch in batches():
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        x = seen.pop()[batch["labels"] != -100]
        expected += x.T @ x
    hook.remove()
    rows = measuring.read_rows(batches(), 100)
    ((_, found),) = measuring.second_moments(model, {name: model.get_submodule(name)}, {name: 48}, rows, NoProgress())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_eva_takes_the_directions_in_which_inputs_are_largest() -> None:
    inputs = matrix(20, 12)
    found = start.eva(inputs.T @ inputs, 3, seed=1)
    assert found.up is None
    same_space(found.down, torch.linalg.svd(inputs, full_matrices=False).Vh[:3])
    torch.testing.assert_close(found.down @ found.down.T, torch.eye(3), rtol=1e-4, atol=1e-5)


def test_a_weight_is_read_through_whatever_module_holds_it() -> None:
    class Hidden(nn.Module):
        """As a quantized module: its weight is nobody's to read."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.inner, self.in_features, self.out_features = [linear], linear.in_features, linear.out_features
            self.register_buffer("packed", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x)

    linear = nn.Linear(700, 5)
    with torch.no_grad():
        found = initialising.full_weight(Hidden(linear), torch.float32)
    torch.testing.assert_close(found, linear.weight.detach(), rtol=1e-5, atol=1e-6)
