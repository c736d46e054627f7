"""A tokenized row as text again, split where supervision begins and ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from hyperion_core.errors import printable

from ..decoding import decode_between
from ..encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_SPANS = 60


@dataclass(frozen=True, slots=True)
class Span:
    """Text of neighbouring tokens that are all learnt, or none of them.

    `special` when it is one special token; `left_out` counts the characters that are not shown in its place.
    """

    text: str
    learnt: bool
    special: bool = False
    left_out: int = 0


def spans(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The whole row, in order; the texts joined are the decoded row.

    Each text is what the row's decoded text grows by, for tokenizers whose decoded pieces depend on what stands
    before them (sentencepiece takes the first space off).
    """
    added = tokenizer.added_tokens_decoder.items()
    specials = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def kind(position: int) -> tuple[bool, int]:
        special = ids[position] in specials
        return labels[position] != IGNORED, position + 1 if special else 0  # each special token for itself

    found, end = [], 0
    for (learnt, special), group in groupby(range(len(ids)), key=kind):
        start, end = end, end + len(list(group))
        found.append(Span(decode_between(tokenizer, ids, start, end), learnt, bool(special)))
    return found


def shortened(found: Sequence[Span], most: int) -> list[Span]:
    """The same with the middle of every long text left out, so that each border of supervision stays in sight.

    Args:
        most: characters of one text.
    """
    short: list[Span] = []
    for span in found:
        if len(span.text) <= most + most // 4:  # leaving out a few words helps nobody
            short.append(span)
            continue
        head, tail = span.text[: most * 2 // 3], span.text[-(most // 3) :]
        gap = len(span.text) - len(head) - len(tail)
        short += [replace(span, text=head), Span("", span.learnt, left_out=gap), replace(span, text=tail)]
    if len(short) <= _MOST_SPANS:
        return short
    half = _MOST_SPANS // 2
    middle = sum(len(span.text) + span.left_out for span in short[half:-half])
    return [*short[:half], Span("", False, left_out=middle), *short[-half:]]


def visible(text: str) -> str:
    """Line breaks and tabs shown, control characters and secrets not obeyed nor shown."""
    return printable(
        re.sub("\r\n?|\n", lambda found: ("␍" if "\r" in found[0] else "") + "⏎\n", text).replace("\t", "⇥   ")
    )
