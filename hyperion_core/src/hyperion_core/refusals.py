"""pydantic's findings in a user's words: why a value is refused, and what would be taken instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .suggest import closest

UNKNOWN_KEY_WHY = "nothing reads it, and a key that does nothing is refused"
_LONGEST = 80

_WHOLE = ("a whole number is wanted", "write a whole number, without quotes: 8")
_NUMBER = ("a number is wanted", "write a number, without quotes: 0.1, or 2e-4")
_TEXT = ("text is wanted", 'write text; where YAML sees a number or a word of its own, in quotes: "8"')
_LIST = ("a list is wanted", "write a list: [one, two]")
_MAPPING = ("a mapping of keys to values is wanted", "write it as a mapping: {key: value}")

# By pydantic's type of error: why, and fix.
_TYPES: Mapping[str, tuple[str, str]] = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": ("true or false is wanted", "write true or false, without quotes"),
    "string_type": _TEXT,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "mapping_type": _MAPPING,
    "none_required": ("nothing may stand here", "leave the key out"),
    "finite_number": ("infinity and NaN are no settings", "write a finite number"),
    "invalid_key": ("keys are words", "put the key in quotes"),
}
# By pydantic's name of a bound: what the value must be.
_BOUNDS: Mapping[str, str] = {
    "gt": "greater than {}",
    "ge": "{} or more",
    "lt": "less than {}",
    "le": "{} or less",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


def explained(line: Mapping[str, Any]) -> tuple[str, str]:
    """Why and fix of one of pydantic's errors."""
    kind, value, context = line["type"], line["input"], line.get("ctx", {})
    if kind in _TYPES:
        why, fix = _TYPES[kind]
        return why, f"{fix}; or leave the key out" if value is None else fix
    if kind == "literal_error":
        return _choice(value, str(context["expected"]))
    for bound, words in _BOUNDS.items():
        if bound in context:
            limit = words.format(context[bound])
            return f"it must be {limit}", f"give {'one' if 'length' in bound else 'a number'} {limit}"
    message = line["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message[:1].lower() + message[1:], "give another value, or leave the key out"


def shown(value: Any) -> str:
    """A value as a person would see it, cut short."""
    if value is None:
        return "nothing (null)"
    try:
        text = repr(value)
    except Exception:  # a number of more digits than Python prints, an object whose repr is broken
        return f"this {type(value).__name__}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _choice(value: Any, expected: str) -> tuple[str, str]:
    options = [option.strip("'\"") for option in expected.replace(" or ", ", ").split(", ")]
    near = closest(value, options) if isinstance(value, str) else None
    if len(options) == 1:
        return f"it can only be {expected}", f"write {expected}"
    listed = ", ".join(options)
    return f"it is one of: {listed}", f'did you mean "{near}"?' if near else "write one of these words"
