"""GPTQ over a whole model: each layer is rounded by what flows into it. Loaded only with torch.

The layers' inputs are followed by us, the rounding is gptqmodel's `GPTQ`. A block of the model is walked through step
by step: what reads the same input is rounded together, and the next step sees the outputs of rounded layers ("true
sequential", in the words of GPTQ's authors). No token of padding takes part: rows are fed one by one, without it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, DataError, HyperionError, ModelError
from torch import Tensor, nn

from .config import GptqConfig
from .gptqmodel_import import gptq_classes
from .grouping import Layout, default_group_size
from .packed_linear import PackedLinear, is_conv1d, linear_shape
from .rounding import Rounded, restored, rounded
from .scale_search import search_scales

_VERSION = 1  # of the format: the one that every reader knows


@dataclass(frozen=True)
class _Call:
    """How a model calls one of its blocks: what goes along with the hidden states."""

    rest: tuple[Any, ...]
    named: Mapping[str, Any]
    by_name: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.by_name:
            given = block(**{**self.named, "hidden_states": hidden})
        else:
            given = block(hidden, *self.rest, **self.named)
        return _first(given)


def sequences(rows: Iterable[Mapping[str, Tensor]], context: int) -> list[Tensor]:
    """Token ids, int64 (1, T), without padding, none longer than `context`; 0 is no limit.

    Raises:
        DataError: there is none.
    """
    found = []
    for row in rows:
        for ids, mask in zip(row["input_ids"], row["attention_mask"], strict=True):
            kept = ids[mask.bool()]
            found += [part[None] for part in kept.split(context or max(len(kept), 1)) if len(part)]
    if not found:
        raise DataError(
            "GPTQ has no calibration data",
            why="it rounds each layer by what flows into it, and there is not a single token",
            fix="give rows of what the model is for: quantization.calibration.dataset, or the run's training data",
        )
    return found


@torch.no_grad()
def quantize(model: Any, planned: list[Layout], config: GptqConfig, tokens: list[Tensor], ctx: RunContext) -> None:
    """Put a quantized module in the place of each that is planned, one after the other.

    Raises:
        CompatibilityError: the model's blocks do not follow one another.
        ModelError: a layer cannot be rounded.
    """
    classes = gptq_classes(ctx.log)
    base = model.base_model
    blocks = _blocks(model, planned)
    with ctx.progress.task("GPTQ: rounding layers", len(planned)) as advance:
        work = _Work(model, config, classes, {each.name: each for each in planned}, advance)
        if blocks:
            hidden, calls = _followed(base, list(blocks), tokens)
            for block, names in blocks.items():
                passes = [partial(call.pop(0), block, each) for call, each in zip(calls, hidden, strict=True)]
                for step in _steps({name: model.get_submodule(name) for name in names}, passes[0]):
                    work.round(step, passes)
                hidden = [one() for one in passes]
                work.pack()
        inside = {name for names in blocks.values() for name in names}
        if outside := [each.name for each in planned if each.name not in inside]:
            device = next(base.parameters()).device
            work.round(_Step(outside), [partial(base, ids.to(device), use_cache=False) for ids in tokens])
            work.pack()


@torch.no_grad()
def rounded_head(model: Any, bits: int, config: GptqConfig, tokens: list[Tensor], ctx: RunContext) -> Rounded:
    """The output head by what flows into it, on a symmetric grid, in groups that are stretches of its rows.

    Raises:
        ModelError: it cannot be rounded.
    """
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    layout = Layout(name, linear_shape(head), bits, default_group_size(head.in_features))
    task = _task(head, layout, config.model_copy(update={"sym": True, "desc_act": False}), gptq_classes(ctx.log))
    watched = head.register_forward_hook(lambda module, args, output: _take(name, task, args[0].detach()))
    try:
        for ids in tokens:
            model(ids.to(head.weight.device), use_cache=False)
    finally:
        watched.remove()
    return _found(name, task, False, layout)


@dataclass(frozen=True)
class _Step:
    """What is rounded together. `calls`: so many calls of them are in every pass; 0 is not known."""

    names: list[str]
    calls: int = 0


class _SeenAll(Exception):
    """Nothing that follows in this pass is needed."""


@dataclass(frozen=True)
class _Work:
    model: Any
    config: GptqConfig
    classes: tuple[Any, Any]
    planned: Mapping[str, Layout]
    advance: Callable[[int], None]
    done: dict[str, PackedLinear] = field(default_factory=dict)

    def round(self, step: _Step, passes: Iterable[Callable[[], Any]]) -> None:
        """Watch what flows into these modules in each of the passes; then round them.

        Until `pack` a module holds its rounded weight whole: the passes to come need not unpack it each time.
        """
        modules = {name: self.model.get_submodule(name) for name in step.names}
        tasks = {name: _task(module, self.planned[name], self.config, self.classes) for name, module in modules.items()}
        seen: list[str] = []

        def take(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            _take(name, tasks[name], args[0].detach())
            seen.append(name)
            if len(seen) == step.calls:
                raise _SeenAll

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(partial(take, name)).remove)
            for one in passes:
                seen.clear()
                with suppress(_SeenAll):
                    one()
        for name, module in modules.items():
            packed = self._packed(name, module, tasks.pop(name))
            weight = packed.unpacked().to(module.weight.dtype)
            module.weight = nn.Parameter(weight.T if is_conv1d(module) else weight, requires_grad=False)
            self.done[name] = packed
            self.advance(1)

    def pack(self) -> None:
        """Put the packed modules in the place of those that were rounded."""
        for name, packed in self.done.items():
            self.model.set_submodule(name, packed)
        self.done.clear()

    def _packed(self, name: str, linear: Any, task: Any) -> PackedLinear:
        layout, weight = self.planned[name], linear.weight
        if task.nsamples:
            linear.weight = nn.Parameter(weight.float(), requires_grad=False)  # what is rounded comes back in its type
            found = _found(name, task, is_conv1d(linear), layout)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        else:  # an expert that no token of the data was sent to
            matrix = weight.T if is_conv1d(linear) else weight
            found = rounded(matrix, layout.bits, layout.group_size, self.config.sym)
        if not torch.isfinite(found.scale).all():
            raise _cannot(name, "a scale is too large for float16, or no number")
        with weight.device:
            packed = PackedLinear(
                linear_shape(linear), linear.bias, layout.bits, layout.group_size, sym=self.config.sym, version=_VERSION
            )
        packed.hold(found)
        return packed


def rounded_by(weight: Tensor, second_moment: Tensor, layout: Layout, config: GptqConfig) -> Tensor:
    """What GPTQ makes of a weight, float32 (out, in), when the mean of x xᵀ over its inputs x is (in, in).

    Raises:
        ModelError: it cannot be rounded.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    task = _task(linear, layout, config, gptq_classes(logging.getLogger(__name__)))
    task.H, task.nsamples = second_moment.float().clone(), 1  # its scale does not matter, and no more is to come
    return restored(_found(layout.name, task, False, layout), ordered=False)


def _task(module: nn.Module, layout: Layout, config: GptqConfig, classes: tuple[Any, Any]) -> Any:
    gptq, options = classes
    task = gptq(
        module,
        options(
            bits=layout.bits,
            group_size=layout.group_size,
            sym=config.sym,
            desc_act=config.desc_act,
            act_group_aware=not config.desc_act,
            damp_percent=config.damp_percent,
            mse=config.mse,
            fallback=None,
            offload_to_disk=False,
        ),
    )
    search_scales(task, layout.group_size)
    return task


def _take(name: str, task: Any, inputs: Tensor) -> None:
    if not inputs.sum(dtype=torch.float32).isfinite():  # gptqmodel would round by nothing, and say so in its log alone
        raise _cannot(name, "what flows into it is not finite (NaN or infinity)")
    task.add_batch(inputs, None)


def _found(name: str, task: Any, transposed: bool, layout: Layout) -> Rounded:
    task.quantizer.configure(perchannel=True)
    try:
        weight, scale, zero, g_idx, *_ = task.quantize(blocksize=_block(task, layout.group_size))
    except (HyperionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a library's: a Hessian that cannot be inverted, numbers that are not finite
        raise _cannot(name, f"{type(error).__name__}: {error}") from error
    finally:
        task.free()
    weight = weight.T if transposed else weight
    index = g_idx.long()
    numbers = (weight.float() / scale[:, index] + zero[:, index]).round().clamp(0, 2**layout.bits - 1)
    return Rounded(
        numbers.T.contiguous().to(torch.uint8),
        scale.T.contiguous().half(),
        zero.T.contiguous().to(torch.uint8),
        g_idx.to(torch.int32),
    )


def _block(task: Any, group_size: int) -> int:
    """Columns that are rounded before their errors reach those behind them. One group, so that its scale is found after
    the errors of all before it have come; on a GPU as many as gptqmodel's kernel takes."""
    return 128 if task.module.weight.device.type == "cuda" else min(group_size, 128)


def _cannot(name: str, why: str) -> ModelError:
    return ModelError(
        f"GPTQ cannot round {name}",
        why=why,
        fix="calibrate on more, or on other rows (quantization.calibration); or raise damp_percent",
    )


def _blocks(model: nn.Module, planned: list[Layout]) -> dict[nn.Module, list[str]]:
    """The outermost members of lists of modules that hold planned ones, in the model's order, with these names."""
    members = {
        f"{name}.{index}".lstrip("."): child
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, child in enumerate(module)
    }
    found: dict[nn.Module, list[str]] = {}
    for each in planned:
        parts = each.name.split(".")
        owners = (".".join(parts[:end]) for end in range(1, len(parts)))
        if owner := next((members[path] for path in owners if path in members), None):
            found.setdefault(owner, []).append(each.name)
    return {member: found[member] for member in members.values() if member in found}


def _followed(base: Any, blocks: list[nn.Module], tokens: list[Tensor]) -> tuple[list[Tensor], list[list[_Call]]]:
    """What goes into the first block, and how each block is called, for every row."""
    device = next(base.parameters()).device
    starts, calls = [], []
    for ids in tokens:
        seen, gave = _passed(base, blocks, ids.to(device))
        if len(seen) != len(blocks) or any(one is not two for one, (two, _) in zip(gave, seen[1:], strict=False)):
            raise CompatibilityError(
                f"gptq cannot quantize a model of the type {type(base).__name__}",
                why="its blocks do not simply follow one another, and what flows into a later one cannot be followed",
                fix="take a quantizer that needs no calibration data: torchao or bnb",
            )
        starts.append(seen[0][0])
        calls.append([call for _, call in seen])
    return starts, calls


def _passed(base: Any, blocks: list[nn.Module], ids: Tensor) -> tuple[list[tuple[Tensor, _Call]], list[Tensor]]:
    """One pass through the model: what each block is given, and how, and what it gives."""
    seen: list[tuple[Tensor, _Call]] = []
    gave: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks:
            before = block.register_forward_pre_hook(
                lambda module, args, named: seen.append(_seen(args, named)), with_kwargs=True
            )
            after = block.register_forward_hook(lambda module, args, output: gave.append(_first(output)))
            stack.callback(before.remove)
            stack.callback(after.remove)
        base(ids, use_cache=False)
    return seen, gave


def _seen(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(args[1:], named, by_name=False)
    return named["hidden_states"], _Call((), named, by_name=True)


def _steps(modules: Mapping[str, nn.Module], one_pass: Callable[[], Any]) -> list[_Step]:
    """In the order of calls: modules that read the same input are rounded together, and experts of one kind."""
    seen: list[tuple[str, Tensor]] = []
    with _inputs_seen(modules, seen):
        one_pass()
    inputs = dict(reversed(seen))  # the first that each was given
    order = list(dict.fromkeys(name for name, _ in seen))
    steps: list[list[str]] = []
    for name in [*order, *(name for name in modules if name not in inputs)]:
        same = (
            step
            for step in steps
            if any(
                _kind(other) == _kind(name) or (name in inputs and inputs.get(other) is inputs[name]) for other in step
            )
        )
        if (step := next(same, None)) is not None:
            step.append(name)
        else:
            steps.append([name])
    called = Counter(name for name, _ in seen)
    # An expert that was not called may be called in another pass.
    return [_Step(step, sum(called[name] for name in step) if inputs.keys() >= set(step) else 0) for step in steps]


@contextmanager
def _inputs_seen(modules: Mapping[str, nn.Module], seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, args[0])))
            stack.callback(hook.remove)
        yield


def _kind(name: str) -> str:
    """The name without the numbers on its path: that of all experts' modules of a kind."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
    return found
