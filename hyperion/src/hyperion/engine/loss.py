"""Log-probabilities of the supervised tokens alone, chunk by chunk: the full logits never exist.

Logits of B rows of T tokens over a vocabulary of V are B*T*V numbers, more than the rest of a small model's
activations together. Here the model runs with its output head fed one position only, while the hidden states on
their way into the head are kept; the head then reads the supervised ones in chunks.

A token's log-probability depends on its own hidden state alone. So its gradient is computed beside it, while the
chunk's logits are there, and the backward pass only scales it by what the objective makes of that token: as in Cut
Your Losses (Wijmans et al. 2025, arXiv:2411.09009), for any objective. A head that trains, is quantized, or caps its
logits has its chunks computed again in the backward pass instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hyperion_core.errors import TrainingError
from hyperion_core.facts import TokenScores
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from .chunk import logits_chunk

IGNORED = -100
_CHECKED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Supervised:
    """The N supervised tokens of a batch, row by row: `logps` (N,) float32 with gradient, `sequence` (N,) the row, or
    the document of a pack, that each stands in, `token` (N,) its id, and the other `scores` of its position."""

    logps: Tensor
    sequence: Tensor
    token: Tensor
    scores: TokenScores


def count_supervised(labels: Tensor) -> Tensor:
    """Tokens of labels (B, T) that are learnt: a scalar. The first position is predicted by none, so never counts."""
    return labels[..., 1:].ne(IGNORED).sum()


def supervised_logprobs(model: Module, inputs: Mapping[str, Any], *, chunk_size: int | None = None) -> Supervised:
    """Log-probability of every supervised token, as the model with its adapters gives it.

    Args:
        model: the outermost model; its output head may be tied, quantized, or under an adapter.
        inputs: what the model's forward takes, input_ids (B, T) among it, and labels (B, T), -100 = not learnt.
            The token at position t+1 is predicted from position t. Where there are `documents`, B is 1.
        chunk_size: supervised tokens whose logits exist at one time; by default what suits the device.

    Raises:
        TrainingError: the model has no output head, or does not call it once a forward pass.
    """
    labels = inputs["labels"]
    following = labels[:, 1:]
    row, position = torch.nonzero(following.ne(IGNORED), as_tuple=True)
    token = following[row, position]
    head = output_head(model)
    hidden = _hidden_states(model, head, {key: value for key, value in inputs.items() if key != "labels"})
    # An adapter may have put virtual tokens before the row: the row's own positions are the last ones.
    hidden = hidden[:, -labels.shape[1] :]
    states = hidden.flatten(0, 1).index_select(0, row * labels.shape[1] + position)
    size = chunk_size or logits_chunk(states.device.type)
    logps, logsumexp, mean = _scores(head, postprocessing(model), states, token, size)
    documents = inputs.get("documents")
    sequence = row if documents is None else documents.numbers(position + 1)
    return Supervised(logps, sequence, token, TokenScores(logsumexp, mean))


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


@dataclass(frozen=True, slots=True)
class Postprocessing:
    """What an architecture does to its head's output: logits · scale, then cap · tanh(logits / cap) where `cap` is not
    0, then the first `width` of them where that is not 0."""

    scale: float = 1.0
    cap: float = 0.0
    width: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits[..., : self.width] if self.width else logits


def postprocessing(model: Module) -> Postprocessing:
    """Read from the model's config.

    A scale (`logit_scale` of Cohere, `lm_head_multiplier` of Falcon-H1, `output_multiplier`, `logits_scaling` of
    Granite, which divides, and of HyperCLOVA X, which multiplies), a soft cap (`final_logit_softcapping` of Gemma 2)
    and the cut of a padded vocabulary (`unpadded_vocab_size` of Inkling). What goes into the head is scaled already:
    `logits_scaling` of MiniCPM3 is no business of this. `check_head` tells when a model does anything else.
    """
    whole: Any = model.config
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= _number(config, name, 1.0)
    kind = str(config.model_type)
    if kind != "minicpm3":
        factor = _number(config, "logits_scaling", 1.0)
        scale = scale * factor if kind.startswith("hyperclovax") else scale / factor
    cap = _number(config, "final_logit_softcapping", 0.0)
    return Postprocessing(scale, cap, int(_number(config, "unpadded_vocab_size", 0)))


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
    if not torch.isfinite(own).all():  # weights that are no numbers: the first step says so
        return
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
        model(**{"use_cache": False, **inputs})  # nothing is generated: a cache would only be filled
    finally:
        hook.remove()
    if len(seen) != 1:
        raise TrainingError(
            f"{type(model).__name__} called its output head {len(seen)} times in one forward pass",
            why="the loss reads the hidden states that go into the head, and expects one call",
            fix="choose another base model, or report this architecture",
        )
    return seen[0]


def _scores(
    head: Module, finish: Postprocessing, states: Tensor, token: Tensor, size: int
) -> tuple[Tensor, Tensor, Any]:
    """Of each state (N, H): the log-probability of its token and the logarithm of the sum of exp(logits), (N,) float32,
    and what gives the mean of its logits."""
    plain = type(head) is Linear and not (head._forward_hooks or head._forward_pre_hooks)
    weight: Any = head.weight if plain else None  # a packed head would unpack all of its own
    bias: Any = head.bias if plain else None
    # float16 has a gradient's scale chosen after this: unscaled, much of it would be lost to rounding
    written_out = weight.dtype == states.dtype != torch.float16 if plain else False
    if written_out and not finish.cap and not any(p.requires_grad for p in head.parameters()):
        if finish.width:
            weight, bias = weight[: finish.width], None if bias is None else bias[: finish.width]
        scaled = states if finish.scale == 1.0 else states * finish.scale
        bias = None if bias is None else bias * finish.scale
        logps, logsumexp = _FrozenHead.apply(scaled, weight, bias, token, size)
        return logps, logsumexp, partial(_mean_logit, scaled, weight, bias)
    parts = [
        checkpoint(_chunk, head, finish, part, ids, use_reentrant=False)
        for part, ids in zip(states.split(size), token.split(size), strict=True)
    ]
    logps, logsumexp, mean = (torch.cat(found) for found in zip(*parts, strict=True))
    return logps, logsumexp, lambda: mean


def _chunk(head: Module, finish: Postprocessing, states: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = finish(head(states[None])[0].float())
    logsumexp = logits.logsumexp(1)
    return logits.gather(1, token[:, None])[:, 0] - logsumexp, logsumexp, logits.mean(1)


def _mean_logit(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        mean = states.float() @ weight.mean(0, dtype=torch.float32)
        return mean if bias is None else mean + bias.float().mean()


class _FrozenHead(torch.autograd.Function):
    """log p(token) and logsumexp of logits Wh + b, each (N,), for states h (N, H) and W (V, H).

    With p the softmax and e the token's one-hot vector, ∂ log p(token) / ∂h = -Wᵀ(p - e) and ∂ logsumexp / ∂h = Wᵀp.
    Wᵀ(p - e) is kept: its small differences would be lost if p and e were rounded apart.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, size: int) -> Any:
        logps, logsumexp = (torch.empty(len(states), dtype=torch.float32, device=states.device) for _ in range(2))
        kept = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        with torch.autocast(states.device.type, enabled=False):
            for first in range(0, len(states), size):
                part = slice(first, first + size)
                logits = linear(states[part], weight, bias).float()
                p = torch.softmax(logits, 1)
                # from the largest probability, which cannot vanish, whatever the token's own is
                largest, where = p.max(1, keepdim=True)
                logsumexp[part] = (logits.gather(1, where) - largest.log())[:, 0]
                logps[part] = logits.gather(1, token[part, None])[:, 0] - logsumexp[part]
                if kept is not None:
                    p.scatter_add_(1, token[part, None], p.new_full((len(p), 1), -1.0))
                    kept[part] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(kept, weight, token)
        ctx.set_materialize_grads(False)
        return logps, logsumexp

    @staticmethod
    def backward(ctx: Any, to_logps: Tensor | None, to_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, weight, token = ctx.saved_tensors
        gradient = torch.zeros_like(kept, dtype=torch.float32)
        if to_logps is not None:
            gradient.addcmul_(kept, to_logps[:, None], value=-1)
        if to_logsumexp is not None:
            gradient.addcmul_(kept + weight[token], to_logsumexp[:, None])
        return gradient.to(kept.dtype), None, None, None, None


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)


def _float_types(model: Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
