"""What the chat template writes, found by giving it marked contents: its own words between them, and its end tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..encoding import template_of_one_day

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2042{}\u2042"  # no template writes it, none takes it apart


class Template:
    """One tokenizer's chat template, asked for texts only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
        texts: dict[int, str] = {**{i: t.content for i, t in added.items() if t.special}, **named}
        self.specials = dict(sorted(texts.items(), key=lambda item: -len(item[1])))

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str | None:
        """The conversation as text; None when the template refuses it."""
        if not self._tokenizer.chat_template:
            return None
        try:
            given = [dict(message) for message in messages]
            template = template_of_one_day(self._tokenizer)
            options = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": template}
            return str(self._tokenizer.apply_chat_template(given, **options))
        except Exception:  # whatever somebody's Jinja runs into: that row is then judged by its contents alone
            return None

    def own_words(self, messages: Sequence[Mapping[str, Any]]) -> list[str] | None:
        """What the template writes before, between and after the contents: len(messages) + 1 texts.

        None when it does not show each content once, in order.
        """
        marked = [{**message, "content": _MARK.format(number)} for number, message in enumerate(messages)]
        text = self.render(marked)
        if text is None:
            return None
        pieces = []
        for number in range(len(messages)):
            before, found, text = text.partition(_MARK.format(number))
            if not found:
                return None
            pieces.append(before)
        return [*pieces, text]

    def first_special(self, text: str) -> int | None:
        """The special token that comes first in a text, the longest where two begin at one place."""
        places = ((text.find(special), -len(special), token) for token, special in self.specials.items() if special)
        return min((place for place in places if place[0] >= 0), default=(0, 0, None))[2]

    def without_specials(self, text: str) -> str:
        for special in self.specials.values():
            text = text.replace(special, "") if special else text
        return text

    def turn_ends(self, conversations: Iterable[Sequence[Mapping[str, Any]]]) -> dict[int, str]:
        """Special tokens with which assistant turns end in these conversations, and their texts."""
        ends: dict[int, str] = {}
        for messages in conversations:
            words = self.own_words(messages)
            for number, message in enumerate(messages if words else ()):
                assert words is not None
                if message.get("role") == "assistant":
                    last = number == len(messages) - 1
                    token = self.first_special(words[number + 1])
                    # Between turns the first special token may open the next one: then it stands in the front too.
                    if token is not None and (last or self.specials[token] not in words[0]):
                        ends[token] = self.specials[token]
        return ends
