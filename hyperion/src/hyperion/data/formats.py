"""Row formats: which one a dataset has, and how a row becomes segments or messages.

| format      | columns                                                                       | becomes    |
| ----------- | ----------------------------------------------------------------------------- | ---------- |
| chat        | messages [{role, content}], or conversations [{from: human/gpt/system, value}] | `messages` |
| instruction | instruction, output, and optionally input                                      | `segments` |
| completion  | prompt, completion                                                             | `segments` |
| text        | text                                                                           | `segments` |

`format="chat"` turns instruction and completion rows into one user and one assistant message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hyperion_core.errors import DataError
from hyperion_core.suggest import closest, did_you_mean

from .templates import InstructionTemplates

FORMATS = ("auto", "chat", "instruction", "completion", "text")
ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLE_NAMES = {"human": "user", "gpt": "assistant"}

# What a row of each shape must have, and may have. The first two shapes are both the format "chat".
_REQUIRED = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL = {"instruction": ("input",)}
_CHAT_SHAPES = ("messages", "conversations")
FIELDS = tuple(field for shape, need in _REQUIRED.items() for field in (*need, *_OPTIONAL.get(shape, ())))

# Parts of a message that a chat template would render, and that {role, content} cannot carry.
_UNSUPPORTED_PARTS = ("tool_calls", "function_call", "reasoning_content")


class BadRow(Exception):
    """One row that cannot be trained on: what is wrong with it, and the fix."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one dataset are read: the shape they have, and the column of each field."""

    format: str
    shape: str
    columns: Mapping[str, str]

    @property
    def output_column(self) -> str:
        """The one column of prepared rows: "messages" or "segments"."""
        return "messages" if self.format == "chat" else "segments"


def detect_layout(found: Iterable[str], label: str, *, format: str = "auto", columns: Mapping[str, str]) -> Layout:
    """Reads off the columns `found` how the rows are to be read.

    `columns` maps our field names to the data's column names. A column "text" beside the columns of another format
    is taken for a rendered copy of the row (alpaca has one) and does not make the set ambiguous.

    Raises:
        DataError: the columns fit no format, or several, or `columns` names one that is not there.
    """
    names = list(found)
    if not names:
        raise DataError(
            f"{label} has no rows", why="it is empty, or no row in it has a column", fix="give a file that holds rows"
        )
    absent = {field: column for field, column in columns.items() if column not in names}
    if absent:
        raise DataError(
            f"{label} has no column " + " or ".join(f'"{column}"' for column in absent.values()),
            why="`columns` asks for "
            + ", ".join(f"{field}: {column}" for field, column in absent.items())
            + f"; found: {_listed(names)}",
            fix=did_you_mean(next(iter(absent.values())), names),
        )
    taken = set(columns.values())
    have = {field: field for field in FIELDS if field in names and field not in taken} | dict(columns)
    shapes = [
        shape
        for shape, need in _REQUIRED.items()
        if set(need) <= set(have) and set(columns) <= {*need, *_OPTIONAL.get(shape, ())}
    ]
    if format == "chat":
        shapes = [s for s in shapes if s in _CHAT_SHAPES] or [s for s in shapes if s != "text"]
    elif format != "auto":
        shapes = [s for s in shapes if s == format]
    elif len(shapes) > 1:
        shapes = [s for s in shapes if s != "text"]
    if len(shapes) != 1:
        raise _no_single_shape(shapes, names, label, format)
    shape = shapes[0]
    chosen = "chat" if format == "chat" or shape in _CHAT_SHAPES else shape
    fields = (*_REQUIRED[shape], *_OPTIONAL.get(shape, ()))
    return Layout(chosen, shape, {field: have[field] for field in fields if field in have})


def _no_single_shape(shapes: list[str], names: list[str], label: str, format: str) -> DataError:
    if shapes:
        return DataError(
            f"{label} can be read in several ways: {', '.join(shapes)}",
            why=f"found the columns {_listed(names)}",
            fix=f'choose one with `format` (for example format: "{_format_of(shapes[0])}"), or name the columns to '
            f"read with `columns` (for example columns: {{{_REQUIRED[shapes[0]][0]}: {_REQUIRED[shapes[0]][0]}}})",
        )
    wanted = [s for s in _REQUIRED if format in ("auto", _format_of(s)) or (format == "chat" and s != "text")]
    needs = "; ".join(f"{_format_of(s)}: {' + '.join(_REQUIRED[s])}" for s in wanted)
    what = "has no columns that can be trained on" if format == "auto" else f'does not fit format "{format}"'
    return DataError(
        f"{label} {what}",
        why=f"found the columns {_listed(names)}; understood are {needs}",
        fix=_columns_fix(wanted, names, format),
    )


def _columns_fix(wanted: list[str], names: list[str], format: str) -> str:
    """How to name the columns: those that are only misspelt where that makes a row, else an example."""
    separator = next((each for each in (";", "\t", "|") if each in names[0]), None) if len(names) == 1 else None
    if separator:
        return f"the cells are separated by {separator!r}, it seems: separate them by commas"
    for shape in wanted:
        meant = {field: field if field in names else closest(field, names) for field in _REQUIRED[shape]}
        if all(meant.values()) and len(set(meant.values())) == len(meant):
            return f"are they misspelt? If not: columns: {{{', '.join(f'{f}: {c}' for f, c in meant.items())}}}"
    fields = _REQUIRED[wanted[0]] if format != "auto" else _REQUIRED["instruction"]
    example = ", ".join(f"{f}: {c}" for f, c in zip(fields, names[-len(fields) :], strict=False))
    return f"say which column is which with `columns`, for example columns: {{{example}}}"


def _format_of(shape: str) -> str:
    return "chat" if shape in _CHAT_SHAPES else shape


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def row_converter(
    layout: Layout, templates: InstructionTemplates, system: str | None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from a row as it was found to a prepared one; it raises `BadRow`."""

    def field(row: Mapping[str, Any], name: str) -> str:
        return _text(row.get(layout.columns[name]), f'"{layout.columns[name]}"')

    def user_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
        if layout.shape == "completion":
            return field(row, "prompt"), field(row, "completion")
        given = _optional(row, layout)
        asked = field(row, "instruction")
        return (asked if given is None else f"{asked}\n{given}"), field(row, "output")

    def chat(row: Mapping[str, Any]) -> dict[str, Any]:
        if layout.shape in _CHAT_SHAPES:
            messages = _messages(row.get(layout.columns[layout.shape]), layout.columns[layout.shape])
        else:
            user, answer = user_and_answer(row)
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return {"messages": messages}

    def segments(row: Mapping[str, Any]) -> dict[str, Any]:
        if layout.shape == "text":
            return {"segments": [_segment(field(row, "text"), True)]}
        if layout.shape == "completion":
            prompt, answer = user_and_answer(row)
        else:
            prompt = templates.prompt(field(row, "instruction"), _optional(row, layout))
            answer = templates.answer(field(row, "output"))
        return {"segments": [_segment(prompt, False), _segment(answer, True)]}

    return chat if layout.format == "chat" else segments


def _segment(text: str, supervised: bool) -> dict[str, Any]:
    return {"text": text, "supervised": supervised}


def _optional(row: Mapping[str, Any], layout: Layout) -> str | None:
    """The input of an instruction row; None when it is missing, None or blank."""
    column = layout.columns.get("input")
    value = None if column is None else row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(value, f'"{column}"')


def _text(value: Any, name: str) -> str:
    if value is None:
        raise BadRow(f"{name} is missing", "fill it in, or take the row out")
    if not isinstance(value, str):
        raise BadRow(f"{name} is not a text but {_kind(value)}", f"write {name} as a text")
    if not value.strip():
        raise BadRow(f"{name} is empty", "fill it in, or take the row out")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    """The same text, refused when it holds half of a surrogate pair: no tokenizer takes that, and no file."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise BadRow(
            f"{name} holds {half!r}, one half of a character, at position {error.start}",
            "cut texts between characters; an emoji is two halves in UTF-16",
        ) from error
    return value


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    """Messages of either spelling as [{role, content}]."""
    if value is None or not isinstance(value, (list, tuple)):
        what = "is missing" if value is None else f"is not a list of messages but {_kind(value)}"
        raise BadRow(f'"{column}" {what}', "write it as [{role: user, content: …}, {role: assistant, content: …}]")
    messages = [_message(message, f'"{column}"[{number}]') for number, message in enumerate(value)]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(
            f'"{column}" has no assistant turn, so there is nothing to learn', "add the answer, or take the row out"
        )
    return messages


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise BadRow(f"{where} is not a message but {_kind(message)}", "write it as {role: …, content: …}")
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    if role_key not in message:
        raise BadRow(
            f"{where} has neither role nor from (it has {_listed(list(message))})",
            "write it as {role: …, content: …} or {from: …, value: …}",
        )
    role = _OTHER_ROLE_NAMES.get(message[role_key], message[role_key]) if isinstance(message[role_key], str) else None
    if role not in ROLES:
        raise BadRow(
            f"{where} has the unknown role {message[role_key]!r}",
            f"roles are {', '.join(ROLES)} (or human, gpt, system)",
        )
    carried = [part for part in _UNSUPPORTED_PARTS if message.get(part)]
    if carried:
        raise BadRow(
            f"{where} carries {', '.join(carried)}, which would be lost",
            f"write {'it' if len(carried) == 1 else 'them'} into the content as the model is to say it",
        )
    content = message.get(content_key)
    # A blank system prompt or tool result is a fact of the conversation; a blank turn is a hole in the data.
    if role in ("system", "tool") and isinstance(content, str):
        return {"role": role, "content": _encodable(content, f"{where}.{content_key}")}
    return {"role": role, "content": _text(content, f"{where}.{content_key}")}


def _kind(value: Any) -> str:
    names = {"str": "a text", "list": "a list", "dict": "a mapping", "int": "a number", "float": "a number"}
    shown = repr(value)
    return f"{names.get(type(value).__name__, type(value).__name__)} ({shown[:40]}{'…' if len(shown) > 40 else ''})"
