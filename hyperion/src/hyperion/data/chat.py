"""Which parts of a rendered conversation the model is to learn: each assistant turn up to its end-of-turn token.

Found without knowing the template, by rendering the conversation again with small changes:

- a turn *starts* where the prompt ends that a user of the model would send, that is, the earlier messages rendered
  with the generation prompt. That prompt must be a prefix of the whole conversation: then the model is trained on
  exactly what it will have to continue. Whatever the template writes after the prompt (an empty thinking block,
  say) is what the model has to write, and is learnt.
- its content *ends* where the text stands that follows a marker put in the content's place.
- the turn ends with the first special token between there and the next message's content, or with the
  end-of-sequence token when that follows on its heels. A newline after it, and the next turn's header, are not
  learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hyperion_core.facts import Segment

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]


class PrefixBroken(Exception):
    """The template renders earlier turns differently once later ones follow, so turns cannot be told apart."""


def assistant_segments(
    render: Render, messages: Sequence[Mapping[str, Any]], specials: Iterable[str], eos: str | None
) -> tuple[list[Segment], bool]:
    """The conversation's text in segments, the assistant turns supervised.

    Args:
        render: (messages, add_generation_prompt) to the text of the chat template.
        specials: texts of the tokenizer's special tokens.
        eos: text of its end-of-sequence token.

    Returns:
        The segments, which join to the rendered conversation; and whether an end-of-sequence token has yet to
        follow, because the template ends the last assistant turn with no special token. In that case what the
        template writes after that turn (blank lines, mostly) is left out.

    Raises:
        PrefixBroken: with the reason.
    """
    text = render(messages, False)
    probe = _Probe(render, messages, text)
    ends = tuple(specials)
    segments: list[Segment] = []
    done, open_ended = 0, False
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, content_end = probe.start(number), probe.content_end(number)
        if not done <= start <= content_end:
            raise PrefixBroken(f"turn {number} is not rendered where its prompt ends")
        length = _through_end_token(text[content_end : probe.next_content(number)], ends, eos)
        end = content_end + (length or 0)
        segments += [Segment(text[done:start], False), Segment(text[start:end], True)]
        done, open_ended = end, length is None
    if open_ended and messages[-1]["role"] == "assistant":
        return _filled(segments), True
    return _filled([*segments, Segment(text[done:], False)]), False


def _through_end_token(after: str, ends: tuple[str, ...], eos: str | None) -> int | None:
    """Characters of the text `after` a content up to the end of the token that ends the turn; None without one."""
    found = min(((after.find(token), -len(token)) for token in ends if token and token in after), default=None)
    if found is None:
        return None
    end = first = found[0] - found[1]
    while not (eos and after[:end].endswith(eos)):
        following = max((len(token) for token in ends if token and after.startswith(token, end)), default=0)
        if not following:  # the run of special tokens has no end of sequence: what follows is the next turn's
            return first
        end += following
    return end


def _filled(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.text]


class _Probe:
    """Renders one conversation with a marker in the place of a message's content."""

    def __init__(self, render: Render, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        self._render = render
        self._messages = messages
        self._text = text
        self._marked: dict[int, tuple[str, str] | None] = {}
        self._marker = "MESSAGE-CONTENT-0"
        while self._marker in text:
            self._marker += "0"

    def start(self, number: int) -> int:
        """Where the turn's prompt ends in the text."""
        if number == 0:
            return self._content_start(0)
        prompt = self._render(self._messages[:number], True)
        if not self._text.startswith(prompt):
            same = _shared(prompt, self._text)
            raise PrefixBroken(
                f"the prompt of turn {number} ends in {prompt[same:][-60:]!r}, and the whole conversation goes on "
                f"there with {self._text[same:][:60]!r}"
            )
        return len(prompt)

    def content_end(self, number: int) -> int:
        around = self._around(number)
        if around is None or not self._text.endswith(around[1]):
            raise PrefixBroken(f"the content of turn {number} is not rendered as it is, once and for itself")
        return len(self._text) - len(around[1])

    def next_content(self, number: int) -> int:
        """Where the content of the next message that the template shows begins, or the text's end."""
        for later in range(number + 1, len(self._messages)):
            if self._around(later) is not None:
                return max(self._content_start(later), self.content_end(number))
        return len(self._text)

    def _content_start(self, number: int) -> int:
        around = self._around(number)
        return 0 if around is None else _shared(around[0], self._text)

    def _around(self, number: int) -> tuple[str, str] | None:
        """The text before and after the marker; None when the marker is not shown exactly once."""
        if number not in self._marked:
            changed = [*self._messages]
            changed[number] = {**changed[number], "content": self._marker}
            before, _, after = (marked := self._render(changed, False)).partition(self._marker)
            self._marked[number] = (before, after) if marked.count(self._marker) == 1 else None
        return self._marked[number]


def _shared(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
