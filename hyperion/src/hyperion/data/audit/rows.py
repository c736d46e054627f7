"""What the rows themselves say, apart from any token: their turns, and keys to find the same row again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from hyperion_core.facts import Sequence

_ROWS_A_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One text of a row, and whether it is to be learnt."""

    text: str
    learnt: bool


def turns_of(sequence: Sequence) -> list[Turn]:
    """A row's texts in their order: the messages' contents, or the segments that are not empty."""
    if sequence.messages:
        return [Turn(message["content"], message["role"] == "assistant") for message in sequence.messages]
    return [Turn(segment.text, segment.supervised) for segment in sequence.segments if segment.text]


def bare(text: str) -> str:
    """A text without white space: tokenizers and templates are free to change it."""
    return "".join(text.split())


def keys(rows: Dataset) -> Iterator[tuple[bytes, bytes]]:
    """(key of prompt and answer, key of the prompt) of every row, white space and case aside; the second is empty
    where a row has no prompt. 16 bytes a key."""
    for batch in rows.iter(_ROWS_A_BATCH):
        for number in range(len(next(iter(batch.values())))):
            prompt, answer = _prompt_and_answer({name: values[number] for name, values in batch.items()})
            yield _digest([*prompt, "\0", *answer]), _digest(prompt) if "".join(prompt).strip() else b""


def _prompt_and_answer(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The texts before the last answer, and those from there on. Rows of other columns are an answer as a whole."""
    if "messages" in row:
        texts = [
            (f"{message['role']} {message['content']}", message["role"] == "assistant") for message in row["messages"]
        ]
    elif "segments" in row:
        texts = [(segment["text"], segment["supervised"]) for segment in row["segments"]]
    else:
        return [], [f"{name} {value}" for name, value in sorted(row.items())]
    last = max((place for place, (_, learnt) in enumerate(texts) if learnt), default=len(texts))
    return [text for text, _ in texts[:last]], [text for text, _ in texts[last:]]


def _digest(texts: list[str]) -> bytes:
    plain = "\0".join(" ".join(text.lower().split()) for text in texts)
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()
