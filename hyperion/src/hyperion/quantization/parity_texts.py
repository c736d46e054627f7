"""What two models are compared on where nobody names prompts, and what shows that two tokenizers are not the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hyperion_core.errors import DataError

#: Plain text of many kinds: questions, dialogue, a list, numbers, code, other languages.
DEFAULT_TEXTS: tuple[str, ...] = (
    "The river had risen overnight, and by morning the lower fields stood under a hand's breadth of brown water.",
    "Question: Which planet is closest to the sun?\nAnswer: Mercury is the closest planet to the sun.",
    "To make the dough, mix 500 g of flour with a pinch of salt, then add 320 ml of warm water and stir until smooth.",
    '"I thought you had the keys," said Anna. "No," he answered, "you took them when we left the house."',
    "def mean(values):\n    if not values:\n        return 0.0\n    return sum(values) / len(values)",
    "Dear Ms Okafor, thank you for your letter of 3 May. We have looked into the matter and would like to apologise.",
    "Photosynthesis is the process by which green plants turn light, water and carbon dioxide into sugar and oxygen.",
    "If a train leaves at 9:40 and the journey takes 2 hours and 35 minutes, it arrives at 12:15.",
    "Summarise the text in one sentence: The council met on Tuesday to vote on the new bridge, which was approved.",
    "The three branches of government are the legislative, the executive and the judicial branch.",
    "Once upon a time there was a small fox who was afraid of the dark, so every evening he counted the stars.",
    "Tools needed:\n- a hammer\n- two nails\n- a piece of string about one metre long\n- a pencil",
    "She studied law in Lyon, worked for ten years as a judge, and now teaches at the university of her home town.",
    "Le musée est fermé le lundi, mais le jardin reste ouvert jusqu'à dix-neuf heures pendant tout l'été.",
    "Translate into German: Where is the nearest pharmacy?\nWo ist die nächste Apotheke?",
    "Stocks fell for a third day on Thursday as investors waited for figures on inflation that are due next week.",
)

#: Tokenized only, never fed to a model: what a normalizer, a pre-tokenizer or an added token would treat otherwise.
TOKENIZER_TEXTS: tuple[str, ...] = (
    "ALL CAPITALS, then Mixed Case and lower case",
    "  two spaces before,  two  between and a tab\tand an end  \n\n\nthree lines below ",
    "naïve café, cafe\u0301, Ångström, ﬁne, ½, ①, ｗｉｄｅ, soft\u00adhyphen, zero\u200bwidth",
    "1234567890 3.14159 1,000,000 0x1F 2026-01-31 12:00",
    "don't can't I'm they've 'quoted' “curly” – dash … dots",
    "中文字符 日本語のテキスト 한국어 Русский العربية हिन्दी 🙂👍🏽",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c; } // ok? <tag attr='x'/> {{ x }}",
)


def read_texts(path: Path) -> list[str]:
    """Texts of a file: of .jsonl each line is a string, or an object with "text", or "prompt" and maybe "completion";
    of any other file each line that is not blank is one.

    Raises:
        DataError: the file cannot be read, or has no text in it.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"the prompts {path} cannot be read",
            why=getattr(error, "strerror", None) or str(error),
            fix="give a text file, one prompt a line, or a .jsonl file",
        ) from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    texts = [_text(path, number, line) if path.suffix == ".jsonl" else line for number, line in filled]
    if not any(text.strip() for text in texts):
        raise DataError(f"there are no prompts in {path}", why="the file has no text in it", fix="one prompt a line")
    return texts


def _text(path: Path, number: int, line: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number} is no JSON", why=str(error), fix="write one JSON value a line") from error
    if isinstance(row, str):
        return row
    found = [row.get(key) for key in ("text", "prompt", "completion")] if isinstance(row, dict) else []
    parts = [part for part in found if isinstance(part, str)]
    if not parts:
        raise DataError(
            f"{path}:{number} has no prompt",
            why='it is neither a string nor an object with "text" or "prompt"',
            fix='write {"prompt": "…"} on each line',
        )
    return "".join(parts)
