"""The wording of the held-out messages, which training never sees: another customer's words for the same wishes.

It shares no sentence, no product, no order number and no run of more than LONGEST_SHARED_RUN words with the training
wording. `generate.py --check` fails when that stops being true.
"""

from __future__ import annotations

from wording import Wording

LONGEST_SHARED_RUN = 3
"""A held-out sentence may share at most this many words in a row with the training wording."""

# Several short texts stand on a line from here on.
# fmt: off
TEST = Wording(
    bodies={
        "refund": (
            "Could I get my money returned? The {p} just isn't for me.",
            "I'd like a refund on a {p}, please.",
            "Three weeks since you took the {p} in again and nothing has been credited to me.",
            "For my {p} you overcharged me, and I'd like the excess repaid.",
            "My statement lists a {p} twice. Please sort out the double charge.",
            "Send my payment for this {p} back, please; I dropped it off at your depot.",
            "Money back, please! Your {p} is nothing like the photo.",
            "Is the reimbursement for our {p} still being processed?",
        ),
        "delivery": (
            "I'm wondering where my {p} could be.",
            "Our {p} still isn't here.",
            "Could you check whether the {p} was ever dispatched?",
            "It's been eleven days and no {p} at the door.",
            "Tracking says out for delivery since Tuesday, but no {p}.",
            "Any news on when the {p} turns up?",
            "The parcel with a {p} inside never reached us.",
            "Somebody else must have signed for my {p}, because it isn't with me.",
        ),
        "repair": (
            "Our {p} quit on us yesterday.",
            "I opened the parcel and found the {p} smashed.",
            "The {p} won't start, whatever I try.",
            "Since Sunday the {p} has been making grinding sounds.",
            "A piece snapped off the {p}. Can you mend it?",
            "Do you service a {p} that has died?",
            "My {p} is acting up: it shuts off at random.",
            "My {p} developed a fault and needs fixing.",
        ),
        "advice": (
            "What's the correct way to install the {p}?",
            "Could you walk me through using a {p}?",
            "Will the {p} fit in a small flat?",
            "I'm unsure how my {p} should be maintained. Any guidance?",
            "Are there any accessories that go well with the {p}?",
            "Is it okay to leave the {p} outside in the rain?",
            "Which model of {p} suits a family of four?",
            "What are the dimensions of your {p}?",
        ),
    },
    products=(
        "router", "generator", "motor", "scale", "detector", "engine", "mouse", "hair dryer", "light bulb",
        "water pump", "car charger", "bread maker", "disk drive", "wall heater", "paper shredder",
        "pressure washer", "card reader", "phone charger", "rice steamer", "light switch",
    ),
    order_given=(
        "Ref: {o}.", "You'll find it under {o}.", "Purchase no. {o}.", "My confirmation shows {o}.",
        "Reference: {o}.", "Regarding {o}.", "My receipt reads {o}.",
    ),
    order_missing=(
        "", "", "Sorry, no reference at hand.", "My confirmation mail got deleted.", "It cost me {n} euros.",
        "Apartment {n}, second floor.",
    ),
    openings=("", "", "Good evening.", "Hey,", "To whom it may concern:", "Dear support,"),
    closings=("", "", "Many thanks, Priya", "Cheers!", "This can't wait!"),
    order_numbers=range(6_000, 10_000),
    other_numbers=(35, 80, 28, 64, 19),
)
