"""Reads the header of a GGUF file: metadata, and the names and shapes of its tensors. No numpy, no torch.

Format: docs/gguf.md of the ggml project. The `gguf` package reads the same, but takes seconds over a vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperion_core.errors import ModelError

_STRING, _ARRAY = 8, 9
# GGUF's metadata value types, as struct formats.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_ARRAY_KEPT = 256

# ggml's tensor types: (elements in a block, bytes in a block). Other types are looked up in the gguf package.
BLOCK_SIZES: Mapping[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}


@dataclass(frozen=True, slots=True)
class ArrayLength:
    """Stands for a long metadata array: only its length is kept."""

    length: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """`metadata` by key, arrays longer than 256 as `ArrayLength`; `tensors`: name to shape, (out, in) as in torch."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of_architecture(self, key: str) -> Any:
        """A value under the architecture's own prefix, None when it is absent."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        ModelError: the file is no such GGUF, is damaged, or is cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return GGUFReader(data, path).header()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, ValueError, OSError) as error:
        raise damaged_gguf(path, f"its header cannot be read ({error})") from error


class GGUFReader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise damaged_gguf(self.path, f"it starts with {self.data[:4]!r} instead of b'GGUF'")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ModelError(
                f"{self.path} is a GGUF of a kind that is not read here",
                why="it is big-endian" if version & 0xFFFF == 0 else f"its format version is {version}, not 2 or 3",
                fix="convert it again with a current llama.cpp",
            )
        tensor_count, key_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        tensors: dict[str, tuple[int, ...]] = {}
        end = 0
        for _ in range(tensor_count):
            name = self.string()
            # GGUF writes the fastest dimension first, torch last.
            shape = tuple(reversed([self.scalar("Q") for _ in range(self.scalar("I"))]))
            block, size = self.block_size(self.scalar("I"), name)
            tensors[name] = shape
            end = max(end, self.scalar("Q") + math.prod(shape) // block * size)
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        if start + end > len(self.data):
            raise damaged_gguf(self.path, f"it is cut short: {len(self.data):,} bytes instead of {start + end:,}")
        return GGUFHeader(metadata, tensors)

    def block_size(self, kind: int, tensor: str) -> tuple[int, int]:
        """Of a tensor's type; (1, 0) where nothing here can tell."""
        if kind in BLOCK_SIZES or importlib.util.find_spec("gguf") is None:
            return BLOCK_SIZES.get(kind, (1, 0))
        from gguf.constants import GGML_QUANT_SIZES

        found: dict[int, tuple[int, int]] = {int(each): size for each, size in GGML_QUANT_SIZES.items()}
        if kind not in found:
            raise ModelError(
                f"{self.path} holds {tensor} as a type of weights that is not known: type {kind}",
                why="the installed gguf package does not list it: the file is newer, or damaged",
                fix="python -m pip install -U gguf, or convert the model to a common type such as Q8_0",
            )
        return found[kind]

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise IndexError("a string runs past the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"unknown value type {kind}")
            return self.scalar(_SCALARS[kind])
        inner, length = self.scalar("I"), self.scalar("Q")
        if length <= _LONGEST_ARRAY_KEPT:
            return [self.value(inner) for _ in range(length)]
        if inner == _STRING:
            self.skip_strings(length)
        elif inner in _SCALARS:
            self.at += length * struct.calcsize("<" + _SCALARS[inner])
        else:
            raise ValueError(f"a long array of value type {inner}")
        return ArrayLength(length)

    def skip_strings(self, count: int) -> None:
        # The vocabulary: this loop is most of the time that reading a header takes.
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at


def damaged_gguf(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is not a whole GGUF file", why=why, fix="download or copy it again")
