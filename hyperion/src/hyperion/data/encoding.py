"""Segments and messages to token ids, each with whether it is learnt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import DataError
from hyperion_core.facts import Segment, Sequence

from .chat import PrefixBroken, assistant_segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a position that is not learnt, as torch's cross entropy has it

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANCHORS = ("\n", ":", "a")

Encoded = tuple[list[int], list[bool]]

# Llama 3's own template takes this day where it is given no clock.
_TODAY = datetime(2024, 7, 26)
_ASKS_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


def template_of_one_day(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; where it writes today's date, always the same day, so that the same rows are the same tokens
    on every day, in the cache and when a run is resumed."""
    template = str(tokenizer.get_chat_template())
    return _ASKS_TODAY.sub(lambda call: repr(_TODAY.strftime(call[2])), template)


class Encoder:
    """A tokenizer, and what has to be known of it to encode a row piece by piece.

    Every segment is tokenized for itself, so that the prompt's tokens are exactly those that the model is given when
    it is asked; tokenizing prompt and answer as one text may merge across their border. Tokenizers that put a space
    before every text (sentencepiece) get the later pieces behind an anchor, whose tokens are then taken off.

    Segments: the beginning-of-sequence token is put in front once if the tokenizer itself would add it, and the
    end-of-sequence token is appended, and learnt, after a supervised last segment. Neither is doubled.
    Messages: the chat template alone decides on the beginning, as it does when the model is asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        plain = self._ids(["a"])[0]
        whole = tokenizer("a", verbose=False)["input_ids"]
        self.bos_id: int | None = bos if bos is not None and whole[:1] == [bos] != plain[:1] else None
        self._anchor = self._find_anchor(plain)
        added = tokenizer.added_tokens_decoder.values()
        self._specials = tuple({*tokenizer.all_special_tokens, *(t.content for t in added if t.special)})

    def identity(self) -> str:
        """A hash of everything in the tokenizer that decides about ids and labels."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            state: Any = backend.to_str()
        else:
            state = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        parts = [
            type(self.tokenizer).__name__,
            state,
            self.tokenizer.chat_template,
            self.bos_id,
            self.eos_id,
            sorted(self._specials),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, sequences: Listing[Sequence], numbers: Listing[int]) -> list[Encoded]:
        """Token ids and whether each is learnt, a pair a sequence. `numbers` are the rows', for errors."""
        parts = [
            self._chat(sequence.messages, number) if sequence.messages else _plain_part(sequence.segments)
            for sequence, number in zip(sequences, numbers, strict=True)
        ]
        pieces = iter(self._pieces([part.segments for part in parts]))
        return [self._joined(part, pieces) if part.encoded is None else part.encoded for part in parts]

    def _joined(self, part: _Part, pieces: Iterator[list[int]]) -> Encoded:
        ids: list[int] = []
        learnt: list[bool] = []
        for segment in part.segments:
            piece = next(pieces)
            ids += piece
            learnt += [segment.supervised] * len(piece)
        if part.may_add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
            learnt.insert(0, False)
        if part.add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
            learnt.append(True)
        return ids, learnt

    def _pieces(self, rows: list[list[Segment]]) -> list[list[int]]:
        """The ids of every segment of every row, in one call of the tokenizer."""
        later = [number > 0 for row in rows for number in range(len(row))]
        texts = [segment.text for row in rows for segment in row]
        if self._anchor is None:
            return self._ids(texts)
        anchor, anchor_ids = self._anchor
        found = self._ids([anchor + text if behind else text for text, behind in zip(texts, later, strict=True)])
        for position, behind in enumerate(later):
            if not behind:
                continue
            if found[position][: len(anchor_ids)] == anchor_ids:
                found[position] = found[position][len(anchor_ids) :]
            else:  # the anchor merged with the text
                found[position] = self._ids([texts[position]])[0]
        return found

    def _ids(self, texts: Listing[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]
        return ids

    def _find_anchor(self, plain: list[int]) -> tuple[str, list[int]] | None:
        """A text, and its ids, behind which "a" is tokenized as it is inside a text; None when that is how it is
        tokenized anyway."""
        for anchor in _ANCHORS:
            anchor_ids, behind = self._ids([anchor, f"{anchor}a"])
            if anchor_ids and behind[: len(anchor_ids)] == anchor_ids:
                return None if behind[len(anchor_ids) :] == plain else (anchor, anchor_ids)
        return None

    def _chat(self, messages: Listing[Mapping[str, Any]], number: int) -> _Part:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, and the rows are messages",
                why="base models mostly come without one",
                fix="take an instruction-tuned model, give a `chat_template`, or use instruction rows with templates",
            )
        try:
            segments, add_eos = assistant_segments(self._render, messages, self._specials, self.tokenizer.eos_token)
            return _Part(segments, add_eos=add_eos)
        except (PrefixBroken, _RefusedByTemplate) as error:
            if _GENERATION.search(self.tokenizer.get_chat_template()):
                return _Part([], encoded=self._by_generation_tags(messages, number))
            if isinstance(error, _RefusedByTemplate):
                raise _refusal(number, error) from error
            raise DataError(
                f"row {number}: the chat template does not show which part of the text is the assistant's",
                why=str(error),
                fix="mark the assistant's part with {% generation %} … {% endgeneration %} in the chat template, or "
                "give a `chat_template` that renders earlier turns the same whatever follows",
            ) from error

    def _render(self, messages: Listing[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return str(self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _by_generation_tags(self, messages: Listing[Mapping[str, Any]], number: int) -> Encoded:
        try:
            done = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        except _RefusedByTemplate as error:
            raise _refusal(number, error) from error
        return list(done["input_ids"]), [bool(learnt) for learnt in done["assistant_masks"]]

    def _apply(self, messages: Listing[Mapping[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            given = [dict(message) for message in messages]
            template = template_of_one_day(self.tokenizer)
            return self.tokenizer.apply_chat_template(given, chat_template=template, **options)
        except TemplateSyntaxError as error:
            raise DataError(
                "the tokenizer's chat template is not valid Jinja",
                why=f"line {error.lineno}: {error.message}",
                fix="copy the model again, or give another `chat_template`",
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise _RefusedByTemplate(str(error)) from error


class _RefusedByTemplate(Exception):
    """The chat template raised while it rendered a conversation."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One sequence before its segments are tokenized; `encoded` when it is already."""

    segments: list[Segment]
    add_eos: bool = False
    may_add_bos: bool = False
    encoded: Encoded | None = None


def _plain_part(given: Iterable[Segment]) -> _Part:
    segments = [segment for segment in given if segment.text]
    return _Part(segments, add_eos=bool(segments) and segments[-1].supervised, may_add_bos=True)


def _refusal(number: int, error: Exception) -> DataError:
    return DataError(
        f"row {number}: the chat template refuses the conversation",
        why=str(error),
        fix="change the roles and their order to what the template takes, or give another `chat_template`",
    )
