"""Checks that decode a sample of the rows, and hold their texts against what the rows say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..decoding import decode, decode_between
from .config import AuditConfig
from .findings import Finding, excerpt, share
from .measures import IGNORED
from .rendering import Template
from .rows import Turn, bare, turns_of

if TYPE_CHECKING:
    from hyperion_core.facts import Sequence as RowSequence
    from transformers import PreTrainedTokenizerBase

# Texts that look like special tokens. "[INST]" is none: Llama 2 was trained on it in pieces.
_MARKER = re.compile(r"<\|[\w.\-]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos)>")
_OF_TEMPLATE = 0.5  # a marker in more segment rows than this belongs to their template, not to the data


@dataclass
class Looked:
    """What was found in the sampled rows: "row N: …" by check."""

    rows: int = 0
    masking: list[str] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    unknown: int = 0
    markers: Counter[str] = field(default_factory=Counter)


class Reader:
    """Decodes rows of one tokenizer and compares them with the sequences that they were made of."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        turn_ends: Mapping[int, str],
        literals: Sequence[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._turn_ends = turn_ends
        self._literals = [bare(literal) for literal in literals if literal.strip()]
        self.found = Looked()

    def look(self, number: int, sequence: RowSequence, ids: list[int], labels: list[int], cut: bool) -> None:
        """Compare one row; `cut` when max_length shortened it."""
        self.found.rows += 1
        turns = turns_of(sequence)
        decoded = decode(self._tokenizer, ids)
        unknown = self._tokenizer.unk_token_id
        self.found.unknown += unknown is not None and unknown in ids
        words = self._template.own_words(sequence.messages) if sequence.messages else None
        rendered = self._template.render(sequence.messages) if sequence.messages else None
        if missing := self._missing(turns, words, rendered, decoded, cut):
            self.found.template.append(f"row {number}: {missing}")
        if wrong := self._masking(sequence, turns, words, rendered, ids, labels, cut):
            self.found.masking.append(f"row {number}: {wrong}")
        self._markers(number, sequence, turns, words)

    def _missing(
        self, turns: list[Turn], words: list[str] | None, rendered: str | None, decoded: str, cut: bool
    ) -> str:
        """The text of the template or the row that does not stand in the tokens; "" when all does."""
        have = bare(decoded)
        if cut:
            whole = bare(rendered if rendered is not None else "".join(turn.text for turn in turns))
            middle = have[len(have) // 4 : len(have) // 2]
            return "" if middle in whole else f"{excerpt(decoded)!r} is no part of the row"
        at = 0
        for number, turn in enumerate(turns):
            own = words[number] if words else ""
            for text in (own, turn.text if rendered is None or turn.text.strip() in rendered else ""):
                piece = bare(text)
                place = have.find(piece, at)
                if place < 0:
                    return f"{excerpt(text)!r} does not stand in {excerpt(decoded)!r}"
                at = place + len(piece)
        for literal in self._literals:
            if literal not in have:
                return f"the template's {literal!r} does not stand in {excerpt(decoded)!r}"
        return ""

    def _masking(
        self, sequence: RowSequence, turns: list[Turn], words: list[str] | None, rendered: str | None,
        ids: list[int], labels: list[int], cut: bool,
    ) -> str:  # fmt: skip
        """What is wrong with the learnt stretches of a row; "" when they are its answers, each to its end."""
        spans = _spans(labels)
        answers = self._answers(sequence, turns, words, rendered)
        if not cut and len(spans) != len(answers):
            shown = excerpt(decode(self._tokenizer, [label for label in labels if label != IGNORED]))
            return f"{len(spans)} stretches are learnt, and there are {len(answers)} answers: {shown!r}"
        for index, ((start, stop), (text, prompt, lead, ended)) in enumerate(zip(spans, answers, strict=False)):
            learnt = decode_between(self._tokenizer, ids, start, stop)
            if rendered is not None and text.strip() not in rendered:
                continue  # the template rewrites this answer: what it should be cannot be told from here
            if cut and index == len(spans) - 1:
                begun = bare(self._template.without_specials(learnt).rstrip("\ufffd"))
                if begun and begun not in bare(text) and bare(text) not in begun:
                    return f"{excerpt(learnt)!r} is learnt, and the answer is {excerpt(text)!r}"
                continue
            if wrong := self._differs(learnt, text, prompt, lead, ended, first=start <= 1):
                return wrong
        return ""

    def _answers(
        self, sequence: RowSequence, turns: list[Turn], words: list[str] | None, rendered: str | None
    ) -> list[tuple[str, str, str, bool]]:
        """(text, the prompt before it, what the template writes between the two, whether it ends the text with a
        special token) of each learnt text."""
        if sequence.messages:
            found = []
            for number, turn in enumerate(turns):
                if turn.learnt:
                    prompt = self._template.render(sequence.messages[:number], prompt=True) if number else ""
                    after = self._template.first_special(words[number + 1]) if words else None
                    lead = ""
                    if prompt and rendered and rendered.startswith(prompt):
                        rest = rendered[len(prompt) :]
                        lead = rest.partition(turn.text if turn.text in rest else turn.text.strip())[0]
                    found.append((turn.text, prompt or "", lead, after in self._turn_ends))
            return found
        merged: list[tuple[str, str, str, bool]] = []
        before, open_text = "", None
        for turn in turns:
            if turn.learnt:
                open_text = (open_text or "") + turn.text
                continue
            if open_text is not None:
                merged.append((open_text, before, "", False))
                before, open_text = before + open_text, None
            before += turn.text
        if open_text is not None:
            merged.append((open_text, before, "", False))
        return merged

    def _differs(self, learnt: str, text: str, prompt: str, lead: str, ended: bool, *, first: bool) -> str:
        place = learnt.find(text)
        if place < 0:
            text = text.strip()
            place = learnt.find(text)
        if place >= 0:
            head, tail = learnt[:place], learnt[place + len(text) :]
        else:  # a tokenizer that does not give a text back to the letter
            whole, wanted = bare(learnt), bare(text)
            place = whole.find(wanted)
            if place < 0 and not (first and bare(self._template.without_specials(learnt)) in wanted):
                return f"{excerpt(learnt)!r} is learnt, and the answer is {excerpt(text)!r}"
            head, tail = (whole[:place], whole[place + len(wanted) :]) if place >= 0 else ("", "")
        if head and (prompt.endswith(head) or (bare(head) and _ends_alike(bare(prompt), bare(head)))):
            return f"the prompt's end {excerpt(repr(head))} is learnt with the answer {excerpt(text)!r}"
        if ended and place >= 0 and (beyond := self._beyond_end(tail)):
            return f"{excerpt(repr(beyond))} is learnt after the end of {excerpt(text)!r}"
        if place >= 0 and head != lead and lead.endswith(head) and text in learnt and not first:
            return f"{excerpt(repr(lead))}, which the model has to write before {excerpt(text)!r}, is not learnt"
        if rest := self._template.without_specials(tail).strip():
            return f"{excerpt(rest)!r} is learnt after the answer {excerpt(text)!r}"
        if ended and not any(end in tail for end in self._turn_ends.values()) and place >= 0:
            return f"the end of the turn is not learnt after {excerpt(text)!r}"
        return ""

    def _beyond_end(self, tail: str) -> str:
        """What follows the end of a turn, but for an end-of-sequence token in the same run of special tokens."""
        ends = [(tail.find(end), -len(end)) for end in self._turn_ends.values() if end and end in tail]
        if not ends:
            return ""
        place, length = min(ends)
        beyond, eos = tail[place - length :], str(self._tokenizer.eos_token or "")
        if eos and beyond.endswith(eos) and not self._template.without_specials(beyond):
            return ""
        return beyond

    def _markers(self, number: int, sequence: RowSequence, turns: list[Turn], words: list[str] | None) -> None:
        own = "".join(words) if words else "" if sequence.messages else "".join(turn.text for turn in turns)
        self.found.markers.update(set(_MARKER.findall(own)))
        if not sequence.messages:
            return
        for turn in turns:
            inside = next((text for text in self._template.specials.values() if text and text in turn.text), None)
            if inside:
                self.found.content.append(f"row {number}: {inside} in {excerpt(turn.text)!r}")
                return

    # --- what the looked-at rows say ---

    def masking(self, config: AuditConfig, wrong_labels: int, rows: int) -> Finding:
        """`wrong_labels`: rows of all `rows` with a label that is not its position's token."""
        if wrong_labels:
            return Finding(
                "masking", "refused", f"the labels of {share(wrong_labels, rows)} rows are not their tokens",
                "they are shifted, it seems: the loss shifts them itself, and would shift them twice",
                "give labels that equal input_ids where something is learnt, and -100 elsewhere",
                {"rows": rows, "wrong_labels": wrong_labels},
            )  # fmt: skip
        return self._judged(
            "masking", self.found.masking, config,
            "what is learnt are the answers, each from its first token to its end",
            "learn something else than their answers",
            "the model would learn a piece of the prompt, or miss a piece of the answer or its end",
            "a mask that is off by one, or a chat template whose turns cannot be told apart: look at "
            "`hyperion data preview`, and give another dataset.chat_template",
        )  # fmt: skip

    def template(self, config: AuditConfig) -> Finding:
        why = "what the model sees would not be what it is asked with later"
        if self.found.unknown:
            why += f"; {self.found.unknown:,} of the sampled rows hold texts that the tokenizer does not know"
        return self._judged(
            "template", self.found.template, config, "template and texts stand in the tokens",
            "do not hold the template's text", why,
            "take a tokenizer that knows the template's characters, or tokenize what the template wrote",
        )  # fmt: skip

    def special_tokens(self, config: AuditConfig, chat: bool) -> Finding:
        found = self.found
        most = 0 if chat else _OF_TEMPLATE * found.rows
        split = {
            marker: pieces
            for marker, rows in sorted(found.markers.items())
            if rows > most
            and len(pieces := self._tokenizer(marker, add_special_tokens=False, verbose=False)["input_ids"]) > 1
        }
        counts = {"rows": found.rows, "split": len(split), "rows_with_special_content": len(found.content)}
        if split:
            return Finding(
                "special_tokens", "refused",
                f"{len(split)} special tokens of the template are none of this tokenizer's: {', '.join(split)}",
                "; ".join(f"{marker} becomes {len(ids)} tokens" for marker, ids in list(split.items())[:3])
                + ": the model has never seen that as a border",
                "take the template that belongs to this tokenizer, or add them: new_tokens: ["
                + ", ".join(f'"{marker}"' for marker in split) + "]", counts,
            )  # fmt: skip
        if found.content:
            return Finding(
                "special_tokens",
                "refused" if len(found.content) > config.max_special_in_texts * found.rows else "warned",
                f"{share(len(found.content), found.rows)} sampled chats hold special tokens in their messages",
                "they become real special tokens: a turn ends, or begins, in the middle of a text",
                "take them out of the texts, or raise audit.max_special_in_texts",
                counts, config.max_special_in_texts, tuple(found.content[:3]),
            )  # fmt: skip
        return Finding("special_tokens", "ok", "the template's special tokens are one token each, and stand in no text",
                       counts=counts, threshold=config.max_special_in_texts)  # fmt: skip

    def _judged(
        self, name: str, wrong: list[str], config: AuditConfig, ok: str, bad: str, why: str, fix: str
    ) -> Finding:
        rows = self.found.rows
        counts = {"rows": rows, "wrong": len(wrong)}
        if not wrong:
            return Finding(name, "ok", f"{ok} ({rows:,} rows decoded)", counts=counts, threshold=config.max_mismatched)
        state: Any = "refused" if len(wrong) > config.max_mismatched * rows else "warned"
        return Finding(name, state, f"{share(len(wrong), rows)} sampled rows {bad}", why, fix, counts,
                       config.max_mismatched, tuple(wrong[:3]))  # fmt: skip


def _spans(labels: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of learnt labels."""
    spans: list[tuple[int, int]] = []
    start = None
    for position, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start is None:
            start = position
        elif label == IGNORED and start is not None:
            spans.append((start, position))
            start = None
    return spans


def _ends_alike(one: str, other: str) -> bool:
    return one.endswith(other) or (bool(one) and other.endswith(one))
