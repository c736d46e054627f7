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
from ..engine.random_state import untouched_generators
from . import attention
from .documents import common_beginning, packed

_PROBED_TOKENS = 24

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

    Rows of up to `longest` tokens are no longer than what its config says of windows and scaled positions, which so
    few tokens would not show: some architectures put a window into a mask that packs have none of, and some choose
    their positions' scale by the longest row of a pass.

    Looked at are, with and without a beginning in common: that a document's log-probabilities do not change by a bit
    with the tokens of another, and get no gradient from them; and that they are those of the document alone, to
    rounding.
    """
    was_training = model.training
    if limit := _limit(model, longest):
        return limit
    model.eval()
    try:
        for alike in (False, True):
            if why := _why_not(model, *_two_documents(rows, alike)):
                return why
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code runs into: padded, it may train all the same
        return str(error) or type(error).__name__
    finally:
        model.train(was_training)
    return ""


def _why_not(model: Module, first: _Row, second: _Row, shared: int) -> str:
    own = first["input_ids"][shared:]
    other = {**first, "input_ids": first["input_ids"][:shared] + own[::-1]}
    with untouched_generators(), torch.no_grad():
        alone = supervised_logprobs(model, _placed(Collator(0)([second]), model)).logps
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


def _limit(model: Module, longest: int) -> str:
    for config in _configs(model):
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(config, name, None)
            if isinstance(window, int) and 0 < window < longest and getattr(config, "use_sliding_window", True):
                return f"the longest row has {longest} tokens, and its attention a window of {window} ({name})"
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
