"""Lines of figures in a file that a crash cannot make unreadable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..disk import writing


class MetricsFile:
    """JSON objects, one a line, each with the optimizer step it belongs to under "step".

    Lines are whole once `append` returns. A last line without its line feed is what a crash left of one: reading
    passes over it, and writing removes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; numbers that JSON lacks (NaN, infinities) are written as null.

        Raises:
            TrainingError: the disk refuses.
        """
        text = json.dumps({key: _plain(value) for key, value in line.items()}, ensure_ascii=False, allow_nan=False)
        with writing(self.path.name, self.path.parent):
            self._drop_half_a_line()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Whole lines, in order."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        # splitlines() would also split at U+2028 and its like, which JSON strings may hold
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]

    def size(self) -> int:
        """Bytes of its whole lines."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            return _whole_lines(file)

    def cut_to(self, size: int) -> None:
        """Keep the first `size` bytes: a resumed run writes the others again."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(min(size, self.path.stat().st_size))

    def clear(self) -> None:
        """A new run begins."""
        self.path.unlink(missing_ok=True)

    def _drop_half_a_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            file.truncate(_whole_lines(file))


def _whole_lines(file: BinaryIO) -> int:
    """Bytes up to the last line feed. Mostly that is the end: then one byte is read, whatever the file's length."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return 0
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return end
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value
