"""Write the quickstart's data: support messages and the JSON form that each should become. Standard library only.

    python generate.py            writes train.jsonl and test.jsonl beside this file
    python generate.py --check    says whether the files there are what this program writes

The held-out messages (test.jsonl) are made from wording of their own: other sentences, other products, other order
numbers. `shared_wording()` lists whatever the two have in common, and `--check` fails unless that list is empty.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from held_out import LONGEST_SHARED_RUN, TEST
from wording import TRAIN, Wording

T = TypeVar("T")

SYSTEM = (
    'Answer with JSON: "intent" (refund, delivery, repair or advice), "product" (the item), '
    '"order" (the order code, or null).'
)
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
INTENTS = ("refund", "delivery", "repair", "advice")
TRAIN_ROWS, TEST_ROWS = 480, 160


class Deck:
    """Deals items in random order and starts afresh when all are dealt, so that each comes up about equally often."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._left: dict[Any, list[Any]] = {}

    def deal(self, items: Sequence[T]) -> T:
        left = self._left.setdefault(tuple(items), [])
        if not left:
            left.extend(items)
        # Only random() is promised to give the same numbers in every Python version.
        item: T = left.pop(int(self._rng.random() * len(left)))
        return item


def rows(wording: Wording, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` different chat rows: the system's instruction, a customer's message, the form as JSON."""
    rng = random.Random(seed)
    deck = Deck(rng)
    seen: set[str] = set()
    while len(seen) < count:
        intent = deck.deal(INTENTS)
        product, body = deck.deal(wording.products), deck.deal(wording.bodies[intent])
        has_order = deck.deal((True, True, True, False, False))
        number = wording.order_numbers[int(rng.random() * len(wording.order_numbers))]
        order = f"{deck.deal(LETTERS)}{deck.deal(LETTERS)}-{number}" if has_order else None
        about = deck.deal(wording.order_given if has_order else wording.order_missing)
        about = about.format(o=order, n=deck.deal(wording.other_numbers))
        parts = (deck.deal(wording.openings), body.format(p=product), about, deck.deal(wording.closings))
        message = " ".join(part for part in parts if part)
        if message in seen:
            continue
        seen.add(message)
        form = {"intent": intent, "product": product, "order": order}
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": message},
                {"role": "assistant", "content": json.dumps(form)},
            ]
        }


def sentences(wording: Wording) -> set[str]:
    """Every sentence template of one side."""
    plain = (wording.order_given, wording.order_missing)
    ends = (wording.openings, wording.closings)
    return {text for group in (*wording.bodies.values(), *plain, *ends) for text in group if text}


def shared_wording(train: Wording = TRAIN, test: Wording = TEST) -> list[str]:
    """What the held-out wording has in common with the training wording; empty when it is truly held out.

    Counted are whole sentences, runs of more than LONGEST_SHARED_RUN words, products and order numbers.
    """
    shared = sentences(train) & sentences(test)
    shared |= _runs(train) & _runs(test)
    shared |= set(train.products) & set(test.products)
    shared |= {str(number) for number in set(train.order_numbers) & set(test.order_numbers)}
    return sorted(shared)


def _runs(wording: Wording) -> set[str]:
    length = LONGEST_SHARED_RUN + 1
    found = set()
    for sentence in sentences(wording):
        words = re.findall(r"[a-z']+|{[a-z]}", sentence.lower())
        found |= {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}
    return found


def files() -> dict[str, str]:
    """The name and the content of each file that this program writes."""
    made = {"train.jsonl": rows(TRAIN, TRAIN_ROWS, seed=1), "test.jsonl": rows(TEST, TEST_ROWS, seed=2)}
    return {name: "".join(json.dumps(row) + "\n" for row in side) for name, side in made.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the quickstart's train.jsonl and test.jsonl.")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there; write nothing")
    check = parser.parse_args(arguments).check
    shared = shared_wording()
    if shared:
        print(f"The held-out wording is not held out; it shares with training: {shared}", file=sys.stderr)
        return 1
    folder, wrong = Path(__file__).resolve().parent, []
    for name, content in files().items():
        path = folder / name
        if not check:
            path.write_text(content, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            wrong.append(name)
    if wrong:
        print(f"Not what this program writes: {', '.join(wrong)}. Run it without --check.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
