"""What flows through the modules that are to be wrapped, on a few rows of the training data. Loaded only with torch.

Rows go through one at a time, without padding, and only sums of the size of a weight are kept, for as many modules at
once as fit into `AT_ONCE` bytes; the others follow in further passes. No gradient of the base's weights is computed by
autograd: the input and the gradient of the output of a module suffice, and a quantized one has them too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hyperion_core.context import Progress
from hyperion_core.errors import CompatibilityError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

#: Bytes of sums that are held at once.
AT_ONCE = 2**29
_IGNORED = -100
_BYTES = 4


@dataclass(frozen=True)
class Row:
    """One row of training data: `ids` and `labels`, each (T,), no padding."""

    ids: Tensor
    labels: Tensor

    @property
    def supervised(self) -> Tensor:
        """Where a token is learnt, (T,)."""
        return self.labels != _IGNORED

    @property
    def predicting(self) -> Tensor:
        """Positions whose next token is learnt."""
        return self.supervised[1:].nonzero().flatten()


def read_rows(batches: Iterable[Mapping[str, Tensor]], count: int) -> list[Row]:
    """The first `count` rows that have something to learn.

    Raises:
        CompatibilityError: there is none.
    """
    rows = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            row = Row(ids[mask.bool()], labels[mask.bool()])
            if len(row.predicting):
                rows.append(row)
            if len(rows) == count:
                return rows
    if not rows:
        raise CompatibilityError(
            "the adapter cannot be initialised from this data",
            why="none of its rows has a token that is learnt",
            fix='choose another init_lora_weights, such as "pissa", or other data',
        )
    return rows


class Watch(Protocol):
    """Puts a hook on a module that adds to `into` while `row` goes through."""

    def __call__(self, module: nn.Module, into: Tensor, row: Row) -> RemovableHandle: ...


def second_moments(
    model: nn.Module, modules: Mapping[str, nn.Module], widths: Mapping[str, int], rows: list[Row], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """(name, sum of xxᵀ over the inputs of learnt tokens, (in, in)) of every module."""
    shapes = {name: (width, width) for name, width in widths.items()}
    yield from _summed(model, modules, shapes, rows, _watch_inputs, _forward, progress)


def gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    rows: list[Row],
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient of the summed cross entropy with respect to the weight, (out, in)) of every module."""
    yield from _summed(model, modules, shapes, rows, _watch_gradients, _backward, progress)


def _summed(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    rows: list[Row],
    watch: Watch,
    run: Callable[[nn.Module, Row], None],
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    groups = _groups(shapes)
    with progress.task("initialising the adapter from the data", len(groups) * len(rows)) as advance:
        for group in groups:
            sums = {name: torch.zeros(shapes[name], device=device_of(modules[name])) for name in group}
            for row in rows:
                with ExitStack() as hooks, _as_it_is(model):
                    for name in group:
                        hooks.callback(watch(modules[name], sums[name], row).remove)
                    run(model, row)
                advance(1)
            for name in group:
                yield name, sums.pop(name)


def _groups(shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Names in order, as many together as may be held at once."""
    groups: list[list[str]] = []
    held = 0
    for name, (height, width) in shapes.items():
        size = _BYTES * height * width
        if not groups or held + size > AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _watch_inputs(module: nn.Module, into: Tensor, row: Row) -> RemovableHandle:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        if x.shape[:-1] == (1, len(row.ids)):  # an expert is given some tokens only, and nobody says which
            x = x[0, row.supervised.to(x.device)]
        x = x.reshape(-1, x.shape[-1]).float()
        into.addmm_(x.T, x)

    return module.register_forward_pre_hook(before)


def _watch_gradients(module: nn.Module, into: Tensor, row: Row) -> RemovableHandle:
    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = inputs[0].detach()

        def add(gradient: Tensor) -> None:
            into.addmm_(gradient.reshape(-1, into.shape[0]).float().T, x.reshape(-1, into.shape[1]).float())

        if output.requires_grad:
            output.register_hook(add)

    return module.register_forward_hook(after)


def _forward(model: nn.Module, row: Row) -> None:
    with torch.no_grad():
        _logits(model, row, row.predicting)


def _backward(model: nn.Module, row: Row) -> None:
    with torch.enable_grad(), _gradients_from_the_embedding(model):
        logits = _logits(model, row, row.predicting)
        functional.cross_entropy(logits.float(), row.labels[row.predicting + 1], reduction="sum").backward()


def _logits(model: nn.Module, row: Row, positions: Tensor) -> Tensor:
    """(positions, vocabulary); of no other position where the model can leave them out."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits: Tensor = model(
        input_ids=row.ids[None], use_cache=False, **({"logits_to_keep": positions} if takes else {})
    ).logits[0]
    return logits if takes else logits[positions]


@contextmanager
def _gradients_from_the_embedding(model: Any) -> Iterator[None]:
    """The gradient flows through the whole model, although nothing in it is trained."""
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with nothing that is trained; afterwards as before."""
    training = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, before in training:
            module.training = before
        for parameter in trained:
            parameter.requires_grad_(True)


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device
