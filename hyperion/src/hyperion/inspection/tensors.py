"""The tensors of weight files as their headers tell them: type, shape, bytes. Torch-free."""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from hyperion_core.errors import ModelError

from ..models.facts import read_safetensors_header, shard_names
from ..models.folder import some
from ..models.gguf_header import BLOCK_SIZES, GGUFHeader, GGUFReader, damaged_gguf

# ggml's names of its types, by number; others are looked up in the gguf package.
_GGML = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
         12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file. `dtype` is safetensors' name of it ("BF16"), or ggml's ("Q4_0")."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def safetensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: it is damaged, or cut short.
    """
    read_safetensors_header(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            found[name] = StoredTensor(str(entry["dtype"]), tuple(entry["shape"]), last - first)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; none where it has no such weights.

    Raises:
        ModelError: its index cannot be read, or names files that are not there.
    """
    shards = shard_names(folder)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its {len(shards)} weight files: {some(missing)}",
            why="model.safetensors.index.json names them",
            fix="copy or download the whole model again",
        )
    if shards:
        return [folder / shard for shard in shards]
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def gguf_of(path: Path) -> tuple[GGUFHeader, dict[str, StoredTensor]]:
    """The header of a GGUF file, and its tensors.

    Raises:
        ModelError: it is damaged, or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _TypedReader(data, path)
            header = reader.header()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, ValueError, OSError) as error:
        raise damaged_gguf(path, f"its header cannot be read ({error})") from error
    found = {}
    for name, shape in header.tensors.items():
        kind = reader.kinds[name]
        block, size = BLOCK_SIZES.get(kind) or reader.block_size(kind, name)
        found[name] = StoredTensor(_ggml_name(kind), shape, math.prod(shape) // block * size)
    return header, found


class _TypedReader(GGUFReader):
    """Remembers each tensor's type."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        super().__init__(data, path)
        self.kinds: dict[str, int] = {}

    def block_size(self, kind: int, tensor: str) -> tuple[int, int]:
        self.kinds[tensor] = kind
        return super().block_size(kind, tensor)


def _ggml_name(kind: int) -> str:
    if kind in _GGML or importlib.util.find_spec("gguf") is None:
        return _GGML.get(kind, f"type {kind}")
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind).name
