"""Log-probabilities of the supervised tokens alone, chunk by chunk: the full logits never exist.

Logits of B rows of T tokens over a vocabulary of V are B*T*V numbers, more than the rest of a small model's
activations together. Here the model runs with its output head fed one position only, while the hidden states on
their way into the head are kept; the head then reads the supervised ones in chunks, and each chunk's logits are
freed and computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hyperion_core.errors import TrainingError
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from .chunk import LOGITS_CHUNK

IGNORED = -100
_CHECKED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Supervised:
    """The N supervised tokens of a batch, row by row: `logps` (N,) float32 with gradient, `sequence` (N,) the row that
    each stands in, `token` (N,) its id."""

    logps: Tensor
    sequence: Tensor
    token: Tensor


def count_supervised(labels: Tensor) -> Tensor:
    """Tokens of labels (B, T) that are learnt: a scalar. The first position is predicted by none, so never counts."""
    return labels[..., 1:].ne(IGNORED).sum()


def supervised_logprobs(model: Module, inputs: Mapping[str, Any], *, chunk_size: int = LOGITS_CHUNK) -> Supervised:
    """Log-probability of every supervised token, as the model with its adapters gives it.

    Args:
        model: the outermost model; its output head may be tied, quantized, or under an adapter.
        inputs: what the model's forward takes, input_ids (B, T) among it, and labels (B, T), -100 = not learnt.
            The token at position t+1 is predicted from position t.
        chunk_size: supervised tokens whose logits exist at one time.

    Raises:
        TrainingError: the model has no output head, or does not call it once a forward pass.
    """
    labels = inputs["labels"]
    following = labels[:, 1:]
    sequence, position = torch.nonzero(following.ne(IGNORED), as_tuple=True)
    token = following[sequence, position]
    head = output_head(model)
    hidden = _hidden_states(model, head, {key: value for key, value in inputs.items() if key != "labels"})
    # An adapter may have put virtual tokens before the row: the row's own positions are the last ones.
    hidden = hidden[:, -labels.shape[1] :]
    rows = hidden.flatten(0, 1).index_select(0, sequence * labels.shape[1] + position)
    finish = postprocessing(model)
    parts = [
        checkpoint(_chunk, head, finish, part, ids, use_reentrant=False)
        for part, ids in zip(rows.split(chunk_size), token.split(chunk_size), strict=True)
    ]
    return Supervised(torch.cat(parts), sequence, token)


def output_head(model: Module) -> Module:
    """The module that turns hidden states into logits.

    Raises:
        TrainingError: there is none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, Module):
        raise TrainingError(
            f"{type(model).__name__} has no output head",
            why="its get_output_embeddings() gives no module, so it is no causal language model",
            fix="choose a base model that transformers loads with AutoModelForCausalLM",
        )
    return head


def postprocessing(model: Module) -> Callable[[Tensor], Tensor]:
    """What the model's architecture does to the head's output (..., V), from its config.

    A scale (`logit_scale` of Cohere, `lm_head_multiplier` of Falcon-H1, `output_multiplier`, `logits_scaling` of
    Granite, which divides, and of HyperCLOVA X, which multiplies), a soft cap (`final_logit_softcapping` of Gemma 2)
    and the cut of a padded vocabulary (`unpadded_vocab_size`), in this order. `check_head` tells when a model does
    anything else.
    """
    whole: Any = model.config
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= _number(config, name, 1.0)
    divisor = _number(config, "logits_scaling", 1.0)
    scale = scale * divisor if str(config.model_type).startswith("hyperclovax") else scale / divisor
    cap = _number(config, "final_logit_softcapping", 0.0)
    width = int(_number(config, "unpadded_vocab_size", 0))

    def finish(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits[..., :width] if width else logits

    return finish


def check_head(model: Module, inputs: Mapping[str, Any]) -> None:
    """Compare `supervised_logprobs` with the model's own full logits on a few tokens of the first row.

    Raises:
        TrainingError: they differ: the architecture does something to its logits that is not known here.
    """
    mask = inputs.get("attention_mask")
    row = inputs["input_ids"][:1] if mask is None else inputs["input_ids"][:1, mask[0].bool()]
    row = row[:, :_CHECKED_TOKENS]
    sample = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            mine = supervised_logprobs(model, {**sample, "labels": row}).logps
            logits = model(**sample).logits[0, -row.shape[1] : -1]
            own = logits.float().log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    finally:
        model.train(was_training)
    precision = min(torch.finfo(dtype).bits for dtype in (logits.dtype, *_float_types(model)))
    epsilon = torch.finfo(torch.bfloat16 if precision <= 16 else torch.float32).eps
    allowed = max(1e-4, epsilon * float(logits.abs().max()))
    difference = float((mine - own).abs().mean())
    if not difference <= allowed:
        raise TrainingError(
            f"the loss of {type(model).__name__} cannot be computed in chunks",
            why=f"its log-probabilities differ from the model's own by {difference:.2g} a token (at most {allowed:.2g} "
            "is rounding): the architecture does something to its logits that Hyperion does not know",
            fix="choose another base model, or report this architecture so that hyperion/engine/loss.py learns it",
        )


def _hidden_states(model: Module, head: Module, inputs: Mapping[str, Any]) -> Tensor:
    """(B, T, H): what goes into the head. The head itself sees the last position only."""
    seen: list[Tensor] = []

    def keep(module: Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0][:, -1:], *arguments[1:])

    hook = head.register_forward_pre_hook(keep)
    try:
        model(**inputs)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise TrainingError(
            f"{type(model).__name__} called its output head {len(seen)} times in one forward pass",
            why="the loss reads the hidden states that go into the head, and expects one call",
            fix="choose another base model, or report this architecture",
        )
    return seen[0]


def _chunk(head: Module, finish: Callable[[Tensor], Tensor], rows: Tensor, token: Tensor) -> Tensor:
    logits = finish(head(rows[None])[0].float())
    return logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)


def _float_types(model: Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
