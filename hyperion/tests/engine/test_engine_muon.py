"""Muon: matrices move in all directions alike, everything else as under AdamW; it goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import ConfigError
from torch import Tensor, nn

from hyperion import FinetuneConfig
from hyperion.engine.arguments import optimizer_class, training_arguments
from hyperion.engine.muon import Muon, orthogonalized

RATE = 1e-2


def stepped(optimizer: Any, parameters: list[nn.Parameter], seed: int, steps: int = 5) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(16, 96), (96, 16), (24, 40)])
def test_every_direction_moves_by_about_as_much(shape: tuple[int, int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    given = torch.randn(2, *shape, generator=draw) * torch.logspace(0, -2, shape[1])  # some are a hundredth of others
    found = orthogonalized(given)
    values = torch.linalg.svdvals(found)
    assert (values < 1.3).all() and (values > 0.3).all()
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    torch.testing.assert_close(u.mT @ found @ v.mT, torch.diag_embed(values), atol=0.15, rtol=0.7)


@pytest.mark.parametrize("seed", range(3))
def test_matrices_move_as_in_torchs_own(seed: int) -> None:
    """torch's iterates in bfloat16, so that it is near, not the same."""
    shapes = [(16, 64), (16, 64), (64, 16), (8, 8)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    start = [parameter.detach().clone() for parameter in ours]
    found = stepped(Muon(ours, lr=RATE, weight_decay=0.1, betas=(0.8, 0.9)), ours, seed)
    torch_own = torch.optim.Muon(theirs, lr=RATE, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    wanted = stepped(torch_own, theirs, seed)
    for one, two, before in zip(found, wanted, start, strict=True):
        assert (one - two).norm() < 0.02 * (two - before).norm()


def test_its_step_is_as_long_as_adamws() -> None:
    (matrix,) = parameters((16, 96))
    before = matrix.detach().clone()
    (after,) = stepped(Muon([matrix], lr=RATE), [matrix], 0, steps=1)
    assert (after - before).square().mean().sqrt().item() == pytest.approx(0.2 * RATE, rel=0.25)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_no_matrix_moves_as_by_adamw(seed: int) -> None:
    shapes = [(7,), (1, 9), (9, 1), (3, 4, 5)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    options: dict[str, Any] = {"lr": RATE, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    found = stepped(Muon(ours, **options), ours, seed)
    wanted = stepped(torch.optim.AdamW(theirs, **options), theirs, seed)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_what_it_keeps_is_all_that_it_needs_to_go_on() -> None:
    whole, half = parameters((16, 24), (5,)), parameters((16, 24), (5,))
    wanted = stepped(Muon(whole, lr=RATE), whole, 1, steps=6)
    draw = torch.Generator().manual_seed(1)
    optimizer = Muon(half, lr=RATE)
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer = Muon(half, lr=RATE)
            optimizer.load_state_dict(state)
        for parameter in half:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    assert all(torch.equal(one, two.detach()) for one, two in zip(wanted, half, strict=True))
    kept = sum(tensor.numel() for of in optimizer.state.values() for tensor in of.values() if torch.is_tensor(tensor))
    assert kept == 16 * 24 + 2 * 5


def test_without_a_gradient_nothing_moves() -> None:
    (matrix,) = parameters((4, 6))
    before = matrix.detach().clone()
    Muon([matrix], weight_decay=0.1).step()
    assert torch.equal(matrix, before)
    matrix.grad = torch.zeros_like(matrix)
    Muon([matrix]).step()
    assert torch.equal(matrix, before) and math.isfinite(matrix.sum().item())


def test_a_run_learns_by_it_and_goes_on_to_the_bit(tiny: Any, tmp_path: Path) -> None:
    def run() -> Any:
        config = tiny.LowRankConfig(rank=8, dropout=0.1, lr_ratio=2.0)
        return tiny.Run(tmp_path, config=config, optim="muon", max_steps=8, learning_rate=1e-2)

    whole = run()
    expected = whole.fit()
    saved = torch.load(tmp_path / "checkpoint-4/optimizer.pt", weights_only=True)["state"]
    assert {"momentum"} in [set(state) for state in saved.values()]
    again = run()
    result = again.fit(resume=tmp_path / "checkpoint-4")
    before, after = whole.trained(expected.model), again.trained(result.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_its_name_is_known_and_its_momentum_is_adam_beta1() -> None:
    FinetuneConfig(base_model="owner/model", adapter="lora", training={"optim": "muon"})
    with pytest.raises(ConfigError, match='did you mean "muon"'):
        FinetuneConfig(base_model="owner/model", adapter="lora", training={"optim": "muom"})
    with pytest.raises(ConfigError, match="its momentum is adam_beta1"):
        FinetuneConfig(base_model="owner/model", adapter="lora", training={"optim": "muon", "optim_args": "ns=5"})
    args = training_arguments({"output_dir": "unused", "optim": "muon", "use_cpu": True, "adam_beta1": 0.8})
    kind, options = optimizer_class(args)
    assert kind is Muon and options["betas"][0] == 0.8
