"""Markdown that the generators write."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

_SECTION = re.compile(r"(Args|Raises|Returns|Example|Attributes):(.*)")
_ITEM = re.compile(r"[*`]*[a-zA-Z_][\w`]*(, [*`\w]+)*:( |$)")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what would end a cell is escaped."""
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows)]
    return "\n".join(lines)


def code(text: str) -> str:
    """`text` as it is, whatever it holds."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: sections such as `Args:` become a heading in bold over a list, indented code a block."""
    parts: list[str] = []
    section = False
    for block in _blocks(inspect.cleandoc(docstring or "").splitlines()):
        head = _SECTION.match(block[0])
        if head:
            section = head[1] in ("Args", "Raises", "Returns", "Attributes")
            parts.append(f"**{head[1]}**")
            block = [*([f"    {head[2].strip()}"] if head[2].strip() else []), *block[1:]]
            if not section and block[0].strip().startswith("`"):
                parts.append(block[0].strip())
                block = block[1:]
        if not block:
            continue
        if section and (head or block[0].startswith(" ")):
            parts.append(_items([line[4:] if line.startswith("    ") else line for line in block]))
        elif block[0].startswith("    "):
            lines = [line[4:].partition("  # doctest:")[0].rstrip() for line in block]
            parts.append("\n".join(["```python", *lines, "```"]))
        elif _ITEM.match(block[0]):
            parts.append(_items(block))
        else:
            parts.append(_angles("\n".join(block)))
    return "\n\n".join(parts)


def sentence(text: str) -> str:
    """On one line, fit for a table."""
    return _angles(" ".join(text.split()))


def _blocks(lines: Iterable[str]) -> Iterable[list[str]]:
    """Paragraphs; code that is indented is one of its own."""
    block: list[str] = []
    for line in [*lines, ""]:
        if block and (not line.strip() or _SECTION.match(line)):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _items(block: Sequence[str]) -> str:
    """Lines of `name: meaning`, where further ones of a meaning are indented, as a list."""
    lines = []
    for line in block:
        name, colon, rest = line.partition(":")
        if _ITEM.match(line) and colon:
            names = ", ".join(code(part.strip(" `")) for part in name.split(","))
            lines.append(f"- {names}: {_angles(rest.strip())}")
        else:
            lines.append(f"  {_angles(line.strip())}" if lines else _angles(line.strip()))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _angles(text: str) -> str:
    """Outside code, `<` would begin HTML."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)
