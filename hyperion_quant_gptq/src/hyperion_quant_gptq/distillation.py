"""Scales that learn after rounding, from the unquantized model. Loaded only with torch.

GPTQ rounds layer by layer, and no layer makes good what another has lost. Here the scales of all groups are trained
together, until the model predicts what the unquantized one does: the end-to-end training of quantization parameters of
EfficientQAT (Chen et al. 2024, arXiv:2407.11062), by the divergence from the teacher (Hinton et al. 2015,
arXiv:1503.02531). The numbers on the grid stay, so that the checkpoint has the same size and the same format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from hyperion_core.context import RunContext
from hyperion_core.errors import DataError
from torch import Tensor, nn
from torch.nn import functional

from .packed_embedding import PackedEmbedding, PackedHead, PackedTable
from .packed_linear import PackedLinear

_RATE = 1e-3  # of Adam, for the share by which a scale changes
_WARMUP = 0.05  # of the steps
_ROWS = 4  # sequences of a step
_LENGTH = 512  # tokens that are computed at one time
_HELD_OUT = 8  # of so many sequences one is not learnt from


class _Weight:
    """A packed weight whose scales learn: numbers * scale * (1 + change), in groups that are stretches of a row.

    numbers: int8 or int16 (out, in), 0 where the weight is 0. scale: float32 (out, groups). `order`: which input each
    column stands for, int64 (in,); None is as they come.
    """

    def __init__(self, numbers: Tensor, scale: Tensor, order: Tensor | None, keep: Callable[[Tensor], None]) -> None:
        self.numbers, self.scale, self.order, self.keep = numbers, scale.float(), order, keep
        self.change = nn.Parameter(torch.zeros_like(self.scale))

    def whole(self, change: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float32 (out, in), its columns in `order`; or of these rows alone."""
        numbers, scale = self.numbers, self.scale * (1 + change)
        if rows is not None:
            numbers, scale = numbers[rows], scale[rows]
        groups = numbers.float().unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale.unsqueeze(-1)).flatten(-2)

    def product(self, x: Tensor) -> Tensor:
        """x · Wᵀ: (..., in) to (..., out)."""
        x = x if self.order is None else x[..., self.order]
        return cast(Tensor, _Product.apply(x, self.change, self))

    def gradient(self, of_weight: Tensor) -> Tensor:
        """Of `change`, from that of the whole weight, (out, in)."""
        groups = (of_weight * self.numbers).unflatten(-1, (self.scale.shape[-1], -1))
        return groups.sum(-1) * self.scale

    def learnt(self) -> Tensor:
        """The scales as they are kept, float16 (out, groups)."""
        return (self.scale * (1 + self.change.detach())).half()


class _Product(torch.autograd.Function):
    """Nothing whole waits for the way back: the weight is made again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, weight: _Weight) -> Tensor:
        ctx.save_for_backward(x, change)
        ctx.weight = weight
        return x @ weight.whole(change).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (gradient,) = gradients
        x, change = ctx.saved_tensors
        back = gradient @ ctx.weight.whole(change).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return back, ctx.weight.gradient(of_weight), None


def distill(model: Any, teacher: Callable[[], Any], steps: int, sequences: Sequence[Tensor], ctx: RunContext) -> None:
    """Train the scales of a model's packed modules, and keep them where they are better on sequences held out.

    Args:
        model: with packed modules; what else it has is frozen.
        teacher: loads the unquantized model, on the same device.
        steps: of the optimizer, each of 4 sequences.
        sequences: token ids, int64 (1, T).

    Raises:
        DataError: there are fewer than two sequences.
    """
    parts = [part for ids in sequences for part in ids.split(_LENGTH, dim=1) if part.shape[1] > 1]
    if len(parts) < 2:
        raise DataError(
            "distill_steps has too little calibration data",
            why="some of it is held out, to see that the scales become better, and there is one sequence in all",
            fix="give more rows: quantization.calibration.rows, or another dataset",
        )
    held_out, learnt = parts[::_HELD_OUT], [part for number, part in enumerate(parts) if number % _HELD_OUT]
    wanted = teacher().requires_grad_(False)
    model.requires_grad_(False)
    with _learning(model) as weights:
        before = _divergence(model, wanted, held_out)
        _train(model, wanted, weights, steps, learnt, ctx)
        found = [weight.learnt() for weight in weights]
    old = [weight.scale.half() for weight in weights]
    _keep(weights, found)
    after = _divergence(model, wanted, held_out)
    if after < before:
        ctx.log.info("learning scales: from %.3g to %.3g nats a token from the unquantized model", before, after)
    else:
        _keep(weights, old)
        ctx.log.warning("learning scales made nothing better (%.3g to %.3g nats a token): dropped", before, after)


def _train(
    model: Any, teacher: Any, weights: Sequence[_Weight], steps: int, sequences: Sequence[Tensor], ctx: RunContext
) -> None:
    optimizer = torch.optim.Adam([weight.change for weight in weights], lr=_RATE)
    warmup = max(1, math.ceil(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    order = _shuffled(len(sequences), ctx.seed)
    with ctx.progress.task("GPTQ: learning scales", steps) as advance, torch.enable_grad():
        for _ in range(steps):
            rows = [sequences[next(order)] for _ in range(min(_ROWS, len(sequences)))]
            tokens = sum(ids.shape[1] for ids in rows)
            for ids in rows:
                (_total_divergence(model, teacher, ids) / tokens).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(1)


def _total_divergence(model: Any, teacher: Any, ids: Tensor) -> Tensor:
    """Summed over the tokens of one sequence."""
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        wanted = teacher(ids, use_cache=False).logits.float().log_softmax(-1)
    said = model(ids, use_cache=False).logits.float().log_softmax(-1)
    return functional.kl_div(said, wanted, reduction="sum", log_target=True)


@torch.no_grad()
def _divergence(model: Any, teacher: Any, sequences: Sequence[Tensor]) -> float:
    total = sum(float(_total_divergence(model, teacher, ids)) for ids in sequences)
    return total / sum(ids.shape[1] for ids in sequences)


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count`, each once an epoch, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _keep(weights: Sequence[_Weight], scales: Sequence[Tensor]) -> None:
    for weight, scale in zip(weights, scales, strict=True):
        weight.keep(scale)


@contextmanager
def _learning(model: Any) -> Iterator[list[_Weight]]:
    """Inside, packed modules compute with weights whose scales learn."""
    weights: list[_Weight] = []
    tables: dict[PackedTable, _Weight] = {}
    with ExitStack() as stack:

        def computes(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
            module.forward = forward  # type: ignore[method-assign]
            stack.callback(delattr, module, "forward")

        def of_table(table: PackedTable) -> _Weight:
            if table not in tables:
                numbers, scale = table.grid()
                tables[table] = _Weight(numbers, scale, None, table.take_scales)
                weights.append(tables[table])
            return tables[table]

        for module in model.modules():
            if isinstance(module, PackedLinear):
                numbers, scale, order = module.grid()
                weight = _Weight(numbers, scale, order, module.take_scales)
                weights.append(weight)
                computes(module, _with_bias(weight, module.bias))
            elif isinstance(module, PackedHead):
                computes(module, _with_bias(of_table(module.held), module.bias))
            elif isinstance(module, PackedEmbedding):
                computes(module, _rows(of_table(module.table), module.dtype))
        yield weights


def _with_bias(weight: _Weight, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        y = weight.product(input)
        return y if bias is None else y + bias.to(y.dtype)

    return forward


def _rows(weight: _Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda input: weight.whole(weight.change, input).to(dtype)
