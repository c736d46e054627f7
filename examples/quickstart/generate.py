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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SYSTEM = (
    'Answer with JSON: "intent" (refund, delivery, repair, cancel or advice), "product" (the item), '
    '"order" (the order code, or null).'
)
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
INTENTS = ("refund", "delivery", "repair", "cancel", "advice")
TRAIN_ROWS, TEST_ROWS = 480, 160
LONGEST_SHARED_RUN = 3
"""A held-out sentence may share at most this many words in a row with the training wording."""


@dataclass(frozen=True)
class Wording:
    """Everything one side's messages are made of. `{p}` is the product, `{o}` the order code, `{n}` a plain number."""

    bodies: dict[str, tuple[str, ...]]
    products: tuple[str, ...]
    order_given: tuple[str, ...]
    order_missing: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    order_numbers: range
    other_numbers: tuple[int, ...]


TRAIN = Wording(
    bodies={
        "refund": (
            "I want my money back for the {p}.",
            "Please refund the {p}, I have already sent it back.",
            "I returned the {p} and you have not paid me back.",
            "How do I get a refund for my {p}?",
            "This {p} is not what I expected. Give me back what I paid.",
            "I was charged twice for the {p}. Please return the extra payment.",
            "I do not like the {p} and would like to be reimbursed.",
            "My {p} went back to you last month, but the money has not reached my account.",
            "That {p} is too small for us. We want to return it for a full refund.",
            "You promised to repay me for the {p}.",
            "Refund me for the {p}, it is not as described.",
            "We are unhappy with our {p} and ask for the purchase price back.",
            "The shop has my {p} again. When will the refund arrive?",
            "You took too much from my card for the {p}. I want the difference back.",
            "Still no money for the {p} that I gave back.",
            "A {p} was on sale, but you billed the full price. Correct that and pay me the rest.",
            "When do you return the money for a {p}?",
            "Our bank shows two payments for one {p}. Pay one back.",
            "I am entitled to a refund of this {p}, please arrange it.",
            "The payment for the {p} should be returned to my credit card.",
            "You got your {p} back, now I would like my cash.",
            "Please reverse the charge for that {p}.",
            "The wrong sum was debited for a {p}. Please repay it.",
            "Reimburse us for the {p}, we handed it in at your shop.",
            "I would rather have my money than a new {p}.",
            "Your colleague said the cost of my {p} would be paid back.",
            "The cash for our {p} is still missing after the return.",
            "We paid for a {p} and never used it. What about our money?",
            "I sent the {p} back and wait for my money.",
            "My {p} travels back to you now. Please pay out what it cost.",
            "Why was my card charged two times for a {p}?",
            "The {p} cost less in your advert. I want the rest of the money.",
            "Please put the money for that {p} on my gift card.",
            "I am not satisfied with this {p} and want to get paid back.",
            "Half of the price of the {p} should come back to me.",
            "How many days until the {p} is refunded?",
            "Your shop owes me money for a {p}.",
            "Please compensate me for the {p}.",
        ),
        "delivery": (
            "My {p} has not arrived.",
            "Where is my {p}?",
            "The {p} should have been here last week.",
            "I am still waiting for the {p} to be delivered.",
            "The tracking page for my {p} has not moved for days.",
            "The courier says the {p} was delivered, but nothing came.",
            "When will you ship the {p}?",
            "Can you tell me the delivery date of the {p}?",
            "Our {p} is late. Has it left your warehouse?",
            "The package with the {p} seems to be lost in the post.",
            "The driver left the {p} at the wrong address.",
            "I got an email that a {p} was sent, yet I have received nothing.",
            "How long does shipping of the {p} take?",
            "This {p} was meant to come on Monday and I have seen no van.",
            "Did you send that {p} already?",
            "We never received the {p}.",
            "It has been two weeks and there is still no {p}.",
            "Nobody rang the bell, and the carrier claims to have handed over our {p}.",
            "What is the status of my {p}? I expected the parcel yesterday.",
            "Has this {p} been shipped?",
            "I would like to know when to expect the {p}.",
            "The box came without the {p}. Is it in another parcel?",
            "Please track down my {p}, it is somewhere between you and me.",
            "Which day does the {p} reach us?",
            "I have not got the {p} yet.",
            "Is the {p} on the truck today?",
            "The mailman never came with our {p}.",
            "There was no parcel with my {p} in it at the post office.",
            "Please send me news about the shipment of the {p}.",
            "My {p} went to another city.",
            "Why does the {p} take so long to get to me?",
            "You wrote that this {p} is in transit. For how long?",
            "The whole street got parcels, but I did not get my {p}.",
            "We are waiting at home for a {p}.",
            "Your map shows the van with my {p} far from here.",
            "The {p} is overdue.",
            "Has a {p} been lost by the carrier?",
            "When may I hope to see that {p}?",
        ),
        "repair": (
            "My {p} does not work any more.",
            "The {p} stopped working after two days.",
            "The {p} arrived with a crack in it. Can you fix it?",
            "My {p} is broken.",
            "This {p} will not turn on.",
            "There is a strange noise from the {p} and then it switches off.",
            "A part of our {p} came loose. I would like it repaired.",
            "The {p} is defective, it fails every time I use it.",
            "Can a technician look at my {p}? It is faulty.",
            "The {p} overheats and smells of smoke.",
            "The button on my {p} is stuck.",
            "That {p} fell apart. Is that covered by the warranty?",
            "I need a repair for the {p}, it leaks.",
            "Something inside the {p} is damaged.",
            "Our {p} broke down this morning.",
            "Out of the box, this {p} had scratches and a missing screw.",
            "The {p} shows an error and does nothing.",
            "A handle broke off my {p}.",
            "I dropped nothing, but that {p} has a hole.",
            "Where can I have a {p} repaired?",
            "The {p} was fine for a week and now it is completely dead.",
            "My {p} makes burning smells, so I unplugged it.",
            "The surface of our {p} is cracked.",
            "The {p} keeps failing, please mend it.",
            "A week old and the {p} is useless, nothing happens.",
            "My {p} got stuck and makes a loud noise.",
            "The {p} came damaged.",
            "The {p} you sent is bent.",
            "One corner of our {p} is chipped and a piece is missing.",
            "The {p} has a defect.",
            "Please replace the broken part in my {p}.",
            "Who can fix a {p}?",
            "There is something wrong with this {p}, it quits all the time.",
            "I think that {p} is not working properly.",
            "The {p} ripped when I first used it.",
            "It shattered! The {p} is in two pieces.",
            "The {p} rattles, shakes and stops.",
            "Water gets into my {p}, which should not happen.",
        ),
        "cancel": (
            "Please cancel my {p}.",
            "I do not want the {p} any longer, stop the order.",
            "I ordered the {p} by mistake. Please cancel it.",
            "Cancel the purchase of the {p} before it ships.",
            "I have changed my mind about the {p}, please do not send it.",
            "Can I still withdraw my order for the {p}?",
            "Take the {p} off my order.",
            "I found this {p} cheaper elsewhere, so cancel mine.",
            "I clicked buy twice. Please drop the second {p}.",
            "We no longer need the {p}. Kindly stop the shipment.",
            "Is it too late to cancel the {p}?",
            "Please delete my order of the {p}.",
            "Remove the {p} from my basket, I will not take it.",
            "My son ordered a {p} without asking me. I want to undo that.",
            "Stop! I do not need that {p} after all.",
            "A friend lends me a {p}, so there is no need to send yours.",
            "I wish to cancel our {p}.",
            "Please call back the order for this {p}, we decided against it.",
            "The {p} was ordered in error, do not ship it.",
            "Void my purchase of a {p}, it is not needed.",
            "I pressed the wrong button and bought a {p}. Can you stop it?",
            "Do not pack our {p}, we will not want it.",
            "My plans changed, so no {p} for me, please.",
            "I would like the order of that {p} cancelled.",
            "Please do not ship my {p}, I made an error.",
            "No {p}, please. I do not need one.",
            "We bought a {p} somewhere else, do not send yours.",
            "I want to cancel before the {p} leaves your warehouse.",
            "My wife has already bought a {p}. Please cancel ours.",
            "I must cancel my purchase of the {p}.",
            "The {p} order was a mistake.",
            "Scratch the {p} from the list, we can do without.",
            "I regret that I ordered a {p}. Can it be stopped?",
            "Please forget my order of this {p}.",
            "It was the wrong {p} that I chose, please cancel that one.",
            "Can you stop the {p} from being sent?",
            "I am not going to need the {p}, so take it out of the order.",
            "How can I cancel a {p}?",
        ),
        "advice": (
            "How do I clean the {p}?",
            "Can you explain how to set up the {p}?",
            "Which battery fits the {p}?",
            "Is this {p} safe for children?",
            "I cannot find the manual of the {p}. How is it used?",
            "What is the best way to store the {p}?",
            "Does the {p} come in another colour?",
            "I have a question about the settings of my {p}.",
            "How heavy is the {p}?",
            "Can that {p} be used outdoors?",
            "What size of {p} should I choose?",
            "Please tell me how to put our {p} together.",
            "Would you recommend the {p} for a beginner?",
            "Is there a video that shows how the {p} works?",
            "I am new to this. What are the first steps with a {p}?",
            "Which {p} would you suggest for my mother?",
            "What is the {p} made of?",
            "Can I wash this {p} in the machine?",
            "Do you have tips for taking care of a {p}?",
            "What does the red light on our {p} mean?",
            "Does a {p} need special oil?",
            "I would like to learn more about that {p} before I buy it.",
            "How often should I have to charge the {p}?",
            "Are there extra parts that I can get for my {p}?",
            "How does the {p} work?",
            "What is the right way to use a {p}?",
            "Do you know whether the {p} is loud?",
            "How long does a {p} last?",
            "Which cleaner may I use on my {p}?",
            "Could you give me some hints for the {p}?",
            "Is a {p} hard to put up?",
            "Where do I find instructions for this {p}?",
            "How big is the {p} and will it go through my door?",
            "What else do I have to buy with a {p}?",
            "May I leave our {p} in the sun?",
            "Is it possible to connect the {p} to my phone?",
            "What is the difference between this {p} and the cheaper one?",
            "Does the {p} come with a warranty?",
        ),
    },
    products=(
        "watch", "camera", "printer", "monitor", "chair", "phone", "clock", "fan", "ring", "book", "filter",
        "plate", "cup", "glass", "bag", "box", "shirt", "boot", "hat", "coat", "belt", "sock", "ball", "radio",
        "remote", "screen", "lock", "door", "window", "brush", "comb", "rug", "card", "map", "pen", "frame",
        "robot", "wheel", "boat", "bench", "iron", "jar", "lid", "timer", "lens", "bucket", "sensor", "pipe",
        "tub", "vest", "jug", "marker", "folder", "net", "bat", "pot", "plant", "chain", "key", "seat",
        "rice cooker", "baby monitor", "winter coat", "bread knife", "wall clock", "book shelf", "pan lid",
        "game console", "memory card", "train set", "picture frame", "water filter", "cat tree", "dog bed",
        "fish tank", "bird cage", "car seat", "pressure cooker", "wine rack", "phone case", "door handle",
        "fan heater", "glass vase", "paper lamp",
    ),
    order_given=(
        "My order number is {o}.", "Order {o}.", "It is order {o}.", "Order number: {o}.", "The order was {o}.",
        "I bought it with order {o}.", "This is about order {o}.", "(order {o})", "The number on the invoice is {o}.",
        "See order no. {o}.", "{o} is the code.", "Code {o}.", "It has the code {o}.", "{o}", "Invoice {o}.",
        "The email says {o}.", "I was given the number {o}.", "Please look up {o}.",
    ),
    order_missing=(
        "", "", "", "I do not have the order number.", "I lost the invoice.", "I paid {n} dollars for it.",
        "I bought it {n} days ago.", "I have written to you {n} times.", "I am {n} years old.",
        "There is no code on the paper.", "You can call me at {n} {n} {n}.", "I live at {n} Park Road.", "Size {n}, please.",
        "I am your customer since {n} May.", "I do not know the code.",
    ),
    openings=("", "", "", "Hello,", "Hi,", "Dear team,", "Good morning,", "Hello there!"),
    closings=("", "", "", "Thank you.", "Best regards, Maria", "Please hurry.", "Yours, Tom"),
    order_numbers=range(1_000, 6_000),
    other_numbers=(20, 45, 3, 60, 12, 5, 250, 18),
)

TEST = Wording(
    bodies={
        "refund": (
            "Kindly credit my bank account for this {p}, which is now in your hands once more.",
            "Having shipped the {p} back to your depot, I should see my cash again, shouldn't I?",
            "Your bill for our {p} was higher than agreed, so transfer the surplus to us.",
            "We posted that {p} to you three weeks ago, yet no reimbursement shows on my statement.",
            "This {p} disappoints me. What must I do to have the cost returned?",
            "A refund on this {p} was agreed by phone, and I see none so far.",
            "Since the {p} did not suit us, we'd like every cent we spent on it back.",
            "PayPal took the amount for one {p} two times. Send one of them back.",
        ),
        "delivery": (
            "No sign of any {p} at my door so far.",
            "Any idea what day our {p} gets here?",
            "According to your website a {p} is on its way, but the parcel never turned up.",
            "Could you find out where that {p} got stuck?",
            "Has somebody dispatched this {p} yet? The status says pending.",
            "A neighbour's house seems to have received our {p} instead of us.",
            "You said three days, and ten later this {p} is nowhere to be seen.",
            "We stayed home all Friday and nobody brought the {p}.",
        ),
        "repair": (
            "Since yesterday this {p} is dead, whatever I try.",
            "Our {p} keeps jamming and has a dent on one side.",
            "After one month a hinge on that {p} snapped. Do you mend such things?",
            "Sparks came out when I plugged this {p} in.",
            "That {p} malfunctions constantly; may I bring it to your workshop?",
            "Half the functions of our {p} have quit.",
            "It seems this {p} has a fault: it shuts down by itself.",
            "We unpacked a {p} that is torn and bent.",
        ),
        "cancel": (
            "Don't dispatch that {p}; our plans are different now.",
            "Could you call off what I bought yesterday, namely a {p}?",
            "Our {p} was an accidental purchase, so scrap it, please.",
            "Someone gave me a {p} as a present, so I'd rather not get yours. Please halt it.",
            "Is a cancellation of this {p} possible while it's in your warehouse?",
            "I'd like to back out of buying that {p}.",
            "Forget about this {p}: annul it from our account before packing.",
            "Two are too many, so cancel one {p} and leave the rest as it stands.",
        ),
        "advice": (
            "What do I need to know before using this {p} for the first time?",
            "Could somebody walk me through assembling a {p}?",
            "May one wash that {p} with warm water?",
            "Are spare parts sold for this {p}, and what are they called?",
            "We're unsure whether a {p} like yours would suit a small flat. Any tips?",
            "How long is the guarantee on this {p}?",
            "Tell us, please, which accessories go with that {p}.",
            "What does the blinking symbol mean in the instructions of our {p}?",
        ),
    },
    products=(
        "router", "wallet", "table", "bed", "mouse", "scale", "mask", "motor", "hose", "generator", "rack",
        "board", "flag", "hair dryer", "screen protector", "light bulb", "key chain", "plant stand", "rod", "hook",
    ),
    order_given=(
        "Ref: {o}.", "You'll find it under {o} in your system.", "Purchase no. {o}", "My confirmation says #{o}.",
        "Our reference reads {o}.", "On the receipt I see {o} as order.", "Regarding {o}.",
    ),
    order_missing=(
        "", "", "Sorry, no reference at hand.", "My confirmation mail got deleted.", "It cost me {n} euros.",
        "We live at number {n}, Mill Lane.",
    ),
    closings=("", "", "Many thanks, Priya", "Cheers!", "This can't wait!"),
    openings=("", "", "Good evening.", "Hey,", "To whom it may concern:", "Dear support,"),
    order_numbers=range(6_000, 10_000),
    other_numbers=(35, 80, 28, 64, 19),
)


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
