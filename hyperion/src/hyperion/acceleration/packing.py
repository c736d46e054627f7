"""Whether a model computes the documents of a pack apart, and the means to make it do so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.dropout import _DropoutNd

from ..data.collate import Collator
from ..data.encoding import IGNORED
from ..engine.loss import supervised_logprobs
from ..engine.out_of_memory import ran_out
from ..engine.random_state import untouched_generators
from . import attention
from .documents import common_beginning, packed

_PROBED_TOKENS = 24
# Sliding windows of which a probe shows how they work, and which one that it does not reach.
_NARROW, _WIDE = 4, 10 * _PROBED_TOKENS
# Of what a narrow window changes, how much a pack may be off: bfloat16 rounds by less, a window of one token more or
# less makes more of a difference.
_WINDOW_SHARE = 0.2

_Row = dict[str, list[int]]


@contextmanager
def attending_within_documents(model: Module) -> Iterator[None]:
    """Inside, the attention layers of `model` expect packs: forward passes, and backward passes that compute
    activations again."""
    attention.register()
    before = [(config, config._attn_implementation) for config in _configs(model)]
    for config, _ in before:
        config._attn_implementation = attention.NAME
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def drops(model: Module) -> bool:
    """Whether anything in it drops activations at random: the same ones for all rows, where they share a beginning."""
    if any(module.p for module in model.modules() if isinstance(module, _DropoutNd)):
        return True
    return any(
        "dropout" in name and isinstance(value, float) and value > 0
        for config in _configs(model)
        for name, value in vars(config).items()
    )


def why_not_packed(model: Module, rows: Sequence[Mapping[str, Any]], longest: int = 0) -> str:
    """Why `model` cannot be given packs, found out on a few tokens of two rows; "" where it can.

    Rows of up to `longest` tokens are no longer than what its config says of chunks and scaled positions, which so few
    tokens would not show: some architectures choose their positions' scale by the longest row of a pass.

    Looked at are, with and without a beginning in common: that a document's log-probabilities do not change by a bit
    with the tokens of another, and get no gradient from them; and that they are those of the document alone, to
    rounding. Where rows are longer than a sliding window, they have to be so with a narrow window, too.

    Raises:
        RuntimeError: the memory ran out; padded, it would do so all the more.
    """
    was_training = model.training
    if limit := _limit(model, longest):
        return limit
    model.eval()
    try:
        for alike in (False, True):
            if why := _why_not(model, *_two_documents(rows, alike)):
                return why
        if window := _window_below(model, longest):
            first, second, _ = _two_documents(rows, True)
            if not _windows_are_handed_on(model, first, second):
                return (
                    f"the longest row has {longest} tokens, and its attention a window of {window} (sliding_window), "
                    "to which it does not keep in a pack"
                )
    except Exception as error:  # whatever a model's own code runs into: padded, it may train all the same
        if ran_out(error):
            raise
        return str(error) or type(error).__name__
    finally:
        model.train(was_training)
    return ""


def _why_not(model: Module, first: _Row, second: _Row, shared: int) -> str:
    own = first["input_ids"][shared:]
    other = {**first, "input_ids": first["input_ids"][:shared] + own[::-1]}
    with untouched_generators(), torch.no_grad():
        alone = _alone(model, second)
        with attending_within_documents(model):
            beside, beside_other = (_of_second(model, [before, second]) for before in (first, other))
    with untouched_generators(), attending_within_documents(model), torch.enable_grad():
        reached = _gradient_of_first(model, [first, second], shared)
    exact = beside.device.type == "cpu"  # elsewhere the order of a sum may depend on the moment
    if not (torch.equal(beside, beside_other) if exact else torch.allclose(beside, beside_other, 1e-4, 1e-4)):
        return "a document sees the tokens of another: its layers mix positions in a way of their own"
    if reached:
        return "a document's loss has a gradient in the tokens of another"
    if not _close(beside, alone, model):
        return "a document has other log-probabilities in a pack than alone"
    return ""


def _windows_are_handed_on(model: Module, first: _Row, second: _Row) -> bool:
    """Whether the layers tell attention of their sliding windows, as they must: some architectures have them in their
    mask alone, and a pack has none.

    A window that is as long as a probe is short would not show. So it is made narrow, and the document alone, with the
    model's own mask, says what that changes: the pack has to have this change, not only few differences. Where a
    narrow window changes nothing, it is not known how the model comes by its own.
    """
    with untouched_generators(), torch.no_grad():
        with _windows(model, _WIDE):
            before = _alone(model, second)
        with _windows(model, _NARROW):
            alone = _alone(model, second)
            with attending_within_documents(model):
                beside = _of_second(model, [first, second])
    return float((beside - alone).abs().mean()) < _WINDOW_SHARE * float((before - alone).abs().mean())


@contextmanager
def _windows(model: Module, tokens: int) -> Iterator[None]:
    """Inside, every sliding window is of so many tokens: in the configs, from which masks are made, and in the layers
    that keep a copy."""
    holders: list[tuple[Any, Any]] = [(config, _window(config)) for config in _configs(model)]
    holders += [(module, vars(module).get("sliding_window")) for module in model.modules()]
    before = [(holder, window) for holder, window in holders if isinstance(window, int) and window]
    for holder, _ in before:
        holder.sliding_window = tokens
    try:
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def _window_below(model: Module, longest: int) -> int:
    """A sliding window that is shorter than the longest row; 0 where there is none."""
    windows = [_window(config) for config in _configs(model)]
    return min((window for window in windows if 0 < window < longest), default=0)


def _window(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else 0


def _limit(model: Module, longest: int) -> str:
    for config in _configs(model):
        chunk = getattr(config, "attention_chunk_size", None)
        if isinstance(chunk, int) and 0 < chunk < longest:
            return f"the longest row has {longest} tokens, and its attention chunks of {chunk} (attention_chunk_size)"
        rope = getattr(config, "rope_parameters", None) or {}
        reach = getattr(config, "original_max_position_embeddings", None) or rope.get(
            "original_max_position_embeddings"
        )
        if rope.get("rope_type") in ("longrope", "dynamic") and isinstance(reach, int) and longest > reach:
            return f"the longest row has {longest} tokens, and beyond {reach} its positions depend on the longest row"
    return ""


def _two_documents(rows: Sequence[Mapping[str, Any]], alike: bool) -> tuple[_Row, _Row, int]:
    """Two short documents, which begin alike or do not, and how many tokens a pack of them has once for both."""
    ids = [list(rows[number % len(rows)]["input_ids"])[:_PROBED_TOKENS] for number in range(2)]
    ids = [own * 3 if len(own) < 3 else own for own in ids]  # something has to be predicted
    if not alike:
        first, second = ({"input_ids": own, "labels": own} for own in ids)
        return first, second, common_beginning([first, second])
    beginning = (ids[0] * _PROBED_TOKENS)[:_PROBED_TOKENS]
    ends = [own[:1] + own for own in ids]  # the first token after a beginning in common is not learnt
    first, second = (
        {"input_ids": beginning + own, "labels": [IGNORED] * (len(beginning) + 1) + own[1:]} for own in ends
    )
    return first, second, common_beginning([first, second])


def _alone(model: Module, row: _Row) -> Tensor:
    return supervised_logprobs(model, _placed(Collator(0)([row]), model)).logps


def _of_second(model: Module, rows: list[Any]) -> Tensor:
    found = supervised_logprobs(model, _placed(packed(rows), model))
    return found.logps[found.sequence == 1]


def _gradient_of_first(model: Module, rows: list[Any], shared: int) -> bool:
    """Whether the second document's loss depends on the embeddings of what the first one has of its own."""
    seen: list[Tensor] = []

    def keep(module: Module, arguments: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    embeddings: Any = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(keep)
    try:
        (gradient,) = torch.autograd.grad(_of_second(model, rows).sum(), seen[-1:] or [torch.zeros(())])
    finally:
        hook.remove()
    return bool(gradient[0, shared : len(rows[0]["input_ids"])].any())


def _close(mine: Tensor, own: Tensor, model: Module) -> bool:
    """To rounding, which in a 16-bit type is coarse; what is told apart by it is computed in another way entirely."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    coarse = torch.is_autocast_enabled(mine.device.type) or bool(kinds & {torch.bfloat16, torch.float16})
    return float((mine - own).abs().mean()) <= (0.1 if coarse else 1e-3)


def _placed(batch: Mapping[str, Any], model: Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _configs(model: Module) -> list[Any]:
    """Every config of its modules that says how to attend; most often one that all share."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())
