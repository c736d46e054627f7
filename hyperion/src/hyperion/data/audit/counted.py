"""Checks that count over every row: what is learnt, what was cut, where rows end and begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import AuditConfig
from .findings import Finding, share
from .measures import Measures

Example = Callable[[int], str]
_FEW_LEARNT = 0.02


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The end-of-sequence token, and the tokens with which the chat template ends an assistant turn, with their texts.

    `pad_is_eos`: padding has the same id, so code that masks padding by id masks the end too.
    """

    eos: int | None
    eos_text: str
    turn_ends: dict[int, str]
    pad_is_eos: bool

    def ids(self) -> frozenset[int]:
        return frozenset(self.turn_ends) | (frozenset() if self.eos is None else frozenset({self.eos}))


def supervised(measures: Measures, config: AuditConfig, example: Example) -> Finding:
    """Whether enough is learnt at all. Rows that max_length emptied are the check `truncation`'s."""
    import numpy as np

    tokens, learnt = int(measures.length.sum()), int(measures.supervised.sum())
    nothing = (measures.supervised == 0) & (measures.uncut <= measures.length)
    empty = int(nothing.sum())
    counts = {"tokens": tokens, "learnt": learnt, "rows": measures.rows, "rows_without": empty}
    shown = f"{share(learnt, tokens)} tokens are learnt"
    examples = _examples(np.flatnonzero(nothing), example)
    if learnt <= config.min_supervised * tokens:
        return Finding(
            "supervised", "refused",
            f"{shown}, and at least {config.min_supervised:g} of them must be" if learnt else "no token is learnt",
            "the loss of a row without learnt tokens is 0.0, and such a run teaches nothing",
            "check that the rows have answers or assistant turns, and that max_length leaves them in; or lower "
            "audit.min_supervised", counts, config.min_supervised, examples or _examples(range(measures.rows), example),
        )  # fmt: skip
    if empty > config.max_unlearnt_rows * measures.rows:
        return Finding(
            "supervised", "refused", f"of {share(empty, measures.rows)} rows nothing is learnt",
            "they have no answer or assistant turn, so they would be left out",
            "take these rows out, or raise audit.max_unlearnt_rows", counts, config.max_unlearnt_rows, examples,
        )  # fmt: skip
    if empty:
        return Finding(
            "supervised", "warned", f"of {share(empty, measures.rows)} rows nothing is learnt: they are left out",
            "they have no answer or assistant turn", "", counts, config.max_unlearnt_rows, examples,
        )  # fmt: skip
    if learnt < _FEW_LEARNT * tokens:
        return Finding("supervised", "warned", f"only {shown}", "the answers are short beside their prompts",
                       "this may be what you want; else look at `hyperion data preview`",
                       counts, config.min_supervised)  # fmt: skip
    return Finding("supervised", "ok", shown, counts=counts, threshold=config.min_supervised)


def truncation(
    measures: Measures, config: AuditConfig, max_length: int, cut_in_answer: Any, plain_text: bool, example: Example
) -> Finding:
    """Whether max_length took answers away. `cut_in_answer` (N,): rows whose answers were cut off or shortened."""
    import numpy as np

    cut = int((measures.uncut > measures.length).sum())
    wholly = int((cut_in_answer & (measures.supervised == 0)).sum())
    partly = int(cut_in_answer.sum()) - wholly
    longest = int(measures.uncut.max())
    counts = {"rows": measures.rows, "cut": cut, "wholly": wholly, "partly": partly, "longest": longest}
    threshold = config.max_truncated_answers
    if not wholly + partly:
        what = f"{share(cut, measures.rows)} rows are cut, none in an answer" if cut else "no row is cut"
        return Finding("truncation", "ok", f"{what}; the longest has {longest} tokens", counts=counts,
                       threshold=threshold)  # fmt: skip
    if plain_text:
        return Finding("truncation", "warned", f"{share(cut, measures.rows)} texts are cut: their ends are not learnt",
                       f"max_length is {max_length}, and the longest has {longest} tokens",
                       "split the texts, or raise training.max_length", counts, threshold)  # fmt: skip
    return Finding(
        "truncation",
        "refused" if wholly + partly > threshold * measures.rows else "warned",
        f"max_length {max_length} removes the answers of {share(wholly + partly, measures.rows)} rows: "
        f"{wholly:,} wholly, {partly:,} partly",
        "the model would learn to break off; rows without any answer are left out",
        f"raise training.max_length (the longest row has {longest} tokens), shorten the prompts, or raise "
        "audit.max_truncated_answers",
        counts, threshold, _examples(np.flatnonzero(cut_in_answer), example),
    )  # fmt: skip


def eos(measures: Measures, config: AuditConfig, ends: EndTokens, ends_in_answer: Any, example: Example) -> Finding:
    """Whether the end of the rows that end in an answer, whole ones, is learnt. `ends_in_answer` (N,)."""
    import numpy as np

    if not ends.ids():
        return Finding(
            "eos", "warned", "the tokenizer has no end-of-sequence token",
            "the model does not learn where to stop", "set eos_token in the model's tokenizer_config.json",
        )  # fmt: skip
    judged = ends_in_answer & (measures.uncut <= measures.length) & (measures.supervised > 0)
    without = judged & ~measures.ends
    rows, missing = int(judged.sum()), int(without.sum())
    masked = int((without & measures.has_end).sum())
    counts = {"rows": rows, "without": missing, "masked": masked}
    names = " or ".join(dict.fromkeys([*ends.turn_ends.values(), *([ends.eos_text] if ends.eos is not None else [])]))
    if missing:
        why = f"in {masked:,} of them it stands, and is masked" if masked else "it does not stand in them"
        if masked and ends.pad_is_eos:
            why += ": padding and end are one token here, and padding was masked by its id"
        elif not masked:
            why += ": the template ends without it"
        return Finding(
            "eos", "refused" if missing > config.max_without_eos * rows else "warned",
            f"the end token {names} is not learnt in {share(missing, rows)} rows", f"{why}; the model would never stop",
            "end the template with the end-of-sequence token, and mask padding by position, never by id",
            counts, config.max_without_eos, _examples(np.flatnonzero(without), example),
        )  # fmt: skip
    other = ends.turn_ends and ends.eos is not None and ends.eos not in ends.turn_ends
    if other and not (measures.last_learnt[judged] == ends.eos).any():
        return Finding(
            "eos", "warned", f"answers end with {' or '.join(ends.turn_ends.values())}, and the tokenizer's "
            f"end-of-sequence token is {ends.eos_text}",
            "a server that stops at the tokenizer's token alone runs on", "name both in generation_config.json's "
            "eos_token_id, or take the tokenizer of the instruction-tuned model", counts, config.max_without_eos,
        )  # fmt: skip
    return Finding("eos", "ok", f"{names} is learnt at the end of {rows:,} rows", counts=counts,
                   threshold=config.max_without_eos)  # fmt: skip


def bos(measures: Measures, bos_id: int | None, bos_text: str, example: Example) -> Finding:
    """Whether rows begin with two beginning-of-sequence tokens."""
    import numpy as np

    if bos_id is None:
        return Finding("bos", "ok", "the tokenizer has no beginning-of-sequence token")
    doubled = (measures.first == bos_id) & (measures.second == bos_id)
    twice, once = int(doubled.sum()), int((measures.first == bos_id).sum())
    counts = {"rows": measures.rows, "with": once, "doubled": twice}
    if twice:
        return Finding(
            "bos", "refused", f"{share(twice, measures.rows)} rows begin with two {bos_text}",
            "template and tokenizer each put one in front; a model that is asked sees one",
            f"take {bos_text} out of the template or of the rows", counts, None,
            _examples(np.flatnonzero(doubled), example),
        )  # fmt: skip
    return Finding("bos", "ok", f"{bos_text} stands in front of {share(once, measures.rows)} rows, once",
                   counts=counts)  # fmt: skip


def duplicates(keys: Sequence[tuple[bytes, bytes]], config: AuditConfig, example: Example) -> Finding:
    """How many rows repeat an earlier one, white space and case aside."""
    seen: set[bytes] = set()
    again = []
    for number, (whole, _) in enumerate(keys):
        if whole in seen:
            again.append(number)
        seen.add(whole)
    rows = len(keys)
    counts = {"rows": rows, "repeated": len(again)}
    if not again:
        return Finding("duplicates", "ok", "no row is repeated", counts=counts, threshold=config.max_duplicates)
    too_many = len(again) > config.max_duplicates * rows
    return Finding(
        "duplicates", "refused" if too_many and rows >= config.duplicates_from else "warned",
        f"{share(len(again), rows)} rows repeat an earlier one",
        "each copy weighs as another epoch for that row, and the model learns it by heart",
        "take the copies out, or raise audit.max_duplicates", counts, config.max_duplicates,
        _examples(again, example),
    )  # fmt: skip


def overlap(
    training: Sequence[tuple[bytes, bytes]],
    evaluation: Sequence[tuple[bytes, bytes]],
    config: AuditConfig,
    example: Example,
) -> Finding:
    """How many rows of the evaluation data are also trained on. `example` shows rows of the evaluation data."""
    wholes = {whole for whole, _ in training}
    prompts = {prompt for _, prompt in training if prompt}
    same = [number for number, (whole, _) in enumerate(evaluation) if whole in wholes]
    asked = [number for number, (whole, prompt) in enumerate(evaluation) if whole not in wholes and prompt in prompts]
    rows = len(evaluation)
    counts = {"rows": rows, "same": len(same), "same_prompt": len(asked)}
    if same:
        return Finding(
            "overlap", "refused" if rows >= config.overlap_from and len(same) > config.max_overlap * rows else "warned",
            f"{share(len(same), rows)} evaluation rows are trained on",
            "the evaluation would measure what the model has learnt by heart",
            "take them out of one of the two, or raise audit.max_overlap", counts, config.max_overlap,
            _examples(same, example),
        )  # fmt: skip
    if asked:
        return Finding(
            "overlap", "warned", f"{share(len(asked), rows)} evaluation prompts are trained on, with other answers",
            "the evaluation may be too kind", "split by prompt, if that matters to you", counts, config.max_overlap,
            _examples(asked, example),
        )  # fmt: skip
    return Finding("overlap", "ok", f"none of {rows:,} evaluation rows is trained on", counts=counts,
                   threshold=config.max_overlap)  # fmt: skip


def _examples(numbers: Any, example: Example) -> tuple[str, ...]:
    return tuple(example(int(number)) for number in list(numbers[:3]))
