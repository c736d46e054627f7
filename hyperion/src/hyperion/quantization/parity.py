"""Whether a model that was merged, quantized or converted still answers as the one that it was made of.

Both read the same texts. Compared are the distributions of the next token at every position (Kullback-Leibler
divergence KL(before ‖ after), in nats; whether the likeliest token is the same), and what the two tokenizers make of
the texts, which must be the same ids. One model at a time is in memory: of the first its logits are kept.

torch is imported inside functions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hyperion_core.context import NoProgress, Progress
from hyperion_core.errors import ArtifactError, DataError, HyperionError, ModelError
from hyperion_core.facts import QuantInfo

from .parity_texts import DEFAULT_TEXTS as DEFAULT_TEXTS
from .parity_texts import TOKENIZER_TEXTS

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

#: Written into the folder of what was compared.
PARITY = "parity.json"
# Of one model: at most so many tokens, and so many bytes of logits.
_POSITIONS = 2048
_BYTES = 256 * 2**20
_TOKENS_A_TEXT = 256
_CHAT = "chat: "


@dataclass(frozen=True)
class Reference:
    """What is kept of one model, on the CPU.

    `logits`: of each text, float32 (tokens, vocabulary); row t is about the token after t. `ids`: what was fed.
    `tokenized`: ids of each text and of what shows a difference between tokenizers; chats go by "chat: " and the text.
    `vocabulary`: a hash of tokens, ids and special tokens.
    """

    logits: tuple[Tensor, ...]
    ids: tuple[tuple[int, ...], ...]
    tokenized: Mapping[str, tuple[int, ...]]
    vocabulary: str


@dataclass(frozen=True)
class ParityTolerance:
    """How far two models may be apart: at most `mean_kl` nats a token on average, the likeliest token the same at a
    share `top1` of the positions or more. Token ids may never differ.

    Where the effect of an adapter is known, at most `share` of it may be lost: what is as far from the tuned model as
    its base is, is not the tuned model, however near the three are. Below `noise` nats nothing can be told apart.
    """

    mean_kl: float
    top1: float
    share: float | None = None
    noise: float = 0.0

    def most(self, effect: float | None) -> float:
        """The mean KL divergence that is let through, with an adapter of this effect."""
        if effect is None or self.share is None:
            return self.mean_kl
        return min(self.mean_kl, max(self.noise, self.share * effect))

    def changed(self, mean_kl: float | None, top1: float | None) -> ParityTolerance:
        """With the values that a user gave in place of these; a mean KL divergence then stands alone.

        Raises:
            DataError: one cannot be a tolerance.
        """
        refuse_limits(mean_kl, top1)
        changed = self if top1 is None else replace(self, top1=top1)
        return changed if mean_kl is None else replace(changed, mean_kl=mean_kl, share=None)


def refuse_limits(mean_kl: float | None, top1: float | None) -> None:
    """What a user gave as a tolerance, looked at before anything is computed.

    Raises:
        DataError: it cannot be one.
    """
    for name, value, most in (("mean KL divergence", mean_kl, math.inf), ("share of equal tokens", top1, 1.0)):
        if value is not None and not 0 <= value <= most:
            limits = "0 or more" if most == math.inf else "between 0 and 1"
            raise DataError(f"{value} cannot be the limit of a {name}", fix=f"give a number that is {limits}")


def loosest(*tolerances: ParityTolerance) -> ParityTolerance:
    """What lets through whatever one of these does."""
    shares = [each.share for each in tolerances if each.share is not None]
    return ParityTolerance(
        mean_kl=max(each.mean_kl for each in tolerances),
        top1=min(each.top1 for each in tolerances),
        share=max(shares) if len(shares) == len(tolerances) else None,
        noise=max(each.noise for each in tolerances),
    )


#: For weights rounded to a format once, and a model that computes in it. On a model of 10^8 parameters that alone makes
#: 3e-5 nats in float16 and 2e-3 in bfloat16, which hides what 8 bits in place of 16 make there, but not what 4 bits do.
FORMAT_TOLERANCE: Mapping[str, ParityTolerance] = {
    "float32": ParityTolerance(mean_kl=1e-5, top1=0.995, share=0.01, noise=1e-7),
    "float16": ParityTolerance(mean_kl=5e-4, top1=0.98, share=0.1, noise=1e-4),
    "bfloat16": ParityTolerance(mean_kl=6e-3, top1=0.94, share=0.5, noise=5e-4),
}
# Rounding to the nearest, in groups of 64, makes 0.0024, 0.67 and 2.6 nats in 8, 4 and 3 bits on a model of 10^8
# parameters; methods that look at data make less, and so do larger models.
_QUANTIZED = (
    (7.5, ParityTolerance(mean_kl=0.02, top1=0.9, share=0.75, noise=1e-4)),
    (5.5, ParityTolerance(mean_kl=0.2, top1=0.7, share=0.75, noise=1e-4)),
    (3.5, ParityTolerance(mean_kl=1.0, top1=0.3, share=0.75, noise=1e-4)),
    (2.5, ParityTolerance(mean_kl=3.0, top1=0.1, share=0.75, noise=1e-4)),
    (0.0, ParityTolerance(mean_kl=6.0, top1=0.02, share=0.75, noise=1e-4)),
)


def quantized_tolerance(bits: float) -> ParityTolerance:
    """For weights rounded to `bits` on average: beyond it, hardly anything is left of what the model could do."""
    return next(tolerance for least, tolerance in _QUANTIZED if bits >= least)


def mean_bits(modules: Mapping[str, QuantInfo]) -> float:
    """Over the quantized weights; how many there are in a module follows from its bytes."""
    weights = sum(info.nbytes / info.bits for info in modules.values())
    return sum(info.nbytes for info in modules.values()) / weights if weights else 16.0


@dataclass(frozen=True)
class Parity:
    """How far apart two models are: `mean_kl` and `max_kl` in nats a token, `top1` the share of positions with the same
    likeliest token, `max_logit` the largest difference of a logit. `retokenized` are texts that the second tokenizer
    gives other ids for; at them, no logits are compared. `effect`: how far, in the same mean KL divergence, an adapter
    took the first model from its base, where that is known."""

    texts: int
    positions: int
    mean_kl: float
    max_kl: float
    top1: float
    max_logit: float
    retokenized: tuple[str, ...] = ()
    effect: float | None = None

    def check(self, tolerance: ParityTolerance, what: str) -> None:
        """Refuse `what` ("the merged model") when it is further away than that.

        Raises:
            ArtifactError: it is; says by how much.
        """
        if self.retokenized:
            shown = ", ".join(repr(text if len(text) <= 60 else f"{text[:57]}…") for text in self.retokenized[:3])
            more = len(self.retokenized) - 3
            raise ArtifactError(
                f"{what} has another tokenizer than the model that it was made of",
                why=f"token ids differ for {shown}" + (f" and {more} more" if more > 0 else ""),
                fix="use the tokenizer that the model was trained with; no tolerance lets this through",
            )
        # A comparison with nan is false: only what is certainly near enough passes.
        far, most = [], tolerance.most(self.effect)
        if not self.mean_kl <= most:
            beside = "" if self.effect is None else f" (the adapter itself makes {self.effect:.3g})"
            far.append(f"KL divergence is {self.mean_kl:.3g} nats a token, and {most:.3g} at most may be{beside}")
        if not self.top1 >= tolerance.top1:
            far.append(f"the likeliest token is the same at {self.top1:.1%}, and must be at {tolerance.top1:.1%}")
        if far:
            lost = "too much of what was trained is lost" if most < tolerance.mean_kl else "something is wrong, or lost"
            raise ArtifactError(
                f"{what} does not answer as the model that it was made of",
                why=f"over {self.positions} positions " + "; ".join(far),
                fix=f"{lost}: keep more bits, or take another format (float16, say); what you accept knowingly, "
                "--max-kl and --min-top1 let through",
            )

    def as_data(self) -> dict[str, Any]:
        """Plain data for a JSON file; what is no finite number is None."""
        data = {key: value for key, value in asdict(self).items() if key != "retokenized" and value is not None}
        rounded = {key: _figure(value) for key, value in data.items()}
        return {**rounded, "token_ids_equal": not self.retokenized, "retokenized": list(self.retokenized)}

    def summary(self) -> str:
        """One line for people."""
        return (
            f"KL divergence {self.mean_kl:.3g} nats a token (worst token {self.max_kl:.3g}), same likeliest token at "
            f"{self.top1:.1%} of {self.positions} positions, token ids "
            + ("differ" if self.retokenized else "equal")
        )  # fmt: skip


Load = Callable[[], "tuple[Module, PreTrainedTokenizerBase]"]


def compare_models(
    before: Load, after: Load, texts: Sequence[str] = DEFAULT_TEXTS, progress: Progress | None = None
) -> Parity:
    """The parity of two models that are loaded one after the other; the first is let go of before the second is asked
    for.

    Raises:
        HyperionError: what loading raises; DataError: the texts have no tokens; ModelError: no numbers come out of the
            first; ArtifactError: they have different vocabularies.
    """
    kept = logits_of(*before(), texts, progress)
    return parity(kept, logits_of(*after(), texts, progress, "the model after"))


def logits_of(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    progress: Progress | None = None,
    what: str = "the model",
) -> Reference:
    """What one model says of the texts; its mode is as before.

    Long texts are cut, and many are cut shorter, so that no more than 2048 tokens and 256 MiB of logits are kept: the
    same ones for every model with the same tokenizer and vocabulary.

    Args:
        what: for the progress that is shown: "the merged model".

    Raises:
        DataError: there is no text with a token in it.
    """
    import torch

    given = list(dict.fromkeys(texts))
    tokenized = {text: _ids(tokenizer, text) for text in given}
    fed = [ids for ids in tokenized.values() if ids]
    if not fed:
        raise DataError("there is nothing to compare models on", why="the texts have no tokens", fix="give some text")
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text_config, "vocab_size", None) or len(tokenizer)
    budget = max(1, min(_POSITIONS, _BYTES // (4 * vocabulary)))
    fed = fed[:budget]
    longest = min(_TOKENS_A_TEXT, budget // len(fed), getattr(text_config, "max_position_embeddings", None) or budget)
    fed = [ids[:longest] for ids in fed]
    training = model.training
    model.eval()
    kept = []
    try:
        device = next(model.parameters()).device
        with (progress or NoProgress()).task(f"asking {what}", len(fed)) as advance, torch.no_grad():
            for ids in fed:
                rows = torch.tensor([ids], device=device)
                output: Any = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
                kept.append(output.logits[0].float().cpu())
                advance(1)
    finally:
        model.train(training)
    return Reference(tuple(kept), tuple(fed), {**tokenized, **_probes(tokenizer, given)}, _vocabulary(tokenizer))


def parity(before: Reference, after: Reference) -> Parity:
    """How far `after` is from `before`, over the texts that both tokenize alike.

    Raises:
        ModelError: `before` has no numbers; ArtifactError: the models give logits for different vocabularies.
    """
    import torch

    retokenized = _retokenized(before, after)
    asked = dict(zip(after.ids, after.logits, strict=True))
    total = worst = apart = 0.0
    positions = same = 0
    for ids, logits in zip(before.ids, before.logits, strict=True):
        if torch.isnan(logits).any() or (logits == math.inf).any():
            raise ModelError(
                "the model to compare with gives no numbers: some logits are not finite",
                why="its weights are damaged, or overflow in the number format that it was loaded in",
                fix="load it in bfloat16 or float32",
            )
        other = asked.get(ids)
        if other is None:
            continue
        if other.shape[1] != logits.shape[1]:
            raise _other_vocabulary(logits.shape[1], other.shape[1])
        kl = _kl(logits, other)
        total, worst = total + float(kl.sum()), max(worst, float(kl.max()), key=_or_nan)
        same += int((logits.argmax(-1) == other.argmax(-1)).sum())
        difference = torch.where(logits == other, 0.0, (logits - other).abs())
        apart = max(apart, float(difference.max()), key=_or_nan)
        positions += len(ids)
    if not positions:
        return Parity(len(before.ids), 0, math.inf, math.inf, 0.0, math.inf, retokenized)
    return Parity(len(before.ids), positions, total / positions, worst, same / positions, apart, retokenized)


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of each row, in nats; both are logits (tokens, vocabulary)."""
    import torch

    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    # A token that the first gives no chance counts for nothing, though 0 · -inf would be nan.
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0)


def _or_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _figure(value: float) -> float | int | None:
    return value if isinstance(value, int) else float(f"{value:.6g}") if math.isfinite(value) else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, verbose=False)["input_ids"])


def _probes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Further ids by which tokenizers are told apart: odd text, their added tokens, and a conversation."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    odd = [*TOKENIZER_TEXTS, *(f"a{token}b {token} c" for token in added)]
    found = {text: _ids(tokenizer, text) for text in odd}
    if tokenizer.chat_template is None:
        return found
    from ..data.encoding import template_of_one_day

    template = template_of_one_day(tokenizer)
    for text in texts[:2]:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."},
                    {"role": "user", "content": "Why?"}]  # fmt: skip
        for chat in (messages[:1], messages):
            try:
                rendered = tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template may refuse what it does not like; both must refuse it alike
                rendered = f"{type(error).__name__}: {error}"
            ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
            found[f"{_CHAT}{len(chat)} × {text}"] = tuple(ids)
    return found


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    parts = [
        sorted(tokenizer.get_vocab().items()),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        sorted(tokenizer.all_special_tokens),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _retokenized(before: Reference, after: Reference) -> tuple[str, ...]:
    """What the two tokenizers treat otherwise, named for people."""
    keys = dict.fromkeys([*before.tokenized, *after.tokenized])
    found = [key for key in keys if before.tokenized.get(key) != after.tokenized.get(key)]
    if not found and before.vocabulary != after.vocabulary:
        found.append("the vocabulary, or the special tokens")
    return tuple(found)


def _other_vocabulary(before: int, after: int) -> HyperionError:
    return ArtifactError(
        f"the models cannot be compared: one has logits for {before:,} tokens, the other for {after:,}",
        why="they do not have the same vocabulary",
        fix="compare models with the same tokenizer and embeddings",
    )
