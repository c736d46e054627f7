"""Bits and bytes by module, of a checkpoint that is quantized or not. Torch-free."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hyperion_core.facts import BitPlan, ModelFacts, is_output_head

from .tensors import StoredTensor

_FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
# What a module may hold beside its weights: masks and frequencies that some checkpoints carry along.
_BUFFERS = frozenset({"bias", "masked_bias", "inv_freq", "position_ids"})
_NEVER_PACKED = frozenset({*_FLOATS, "BOOL", "I64"})
_EMBEDDINGS = ("embed", "wte", "wpe", "token_embd")


@dataclass(frozen=True, slots=True)
class ModuleBits:
    """One module as it lies on the disk. `bits` of a weight, None where they cannot be told; `exact` is False where
    they were worked out from the bytes, scales and all. `stored`: the type of its weight."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: float | None
    group_size: int
    stored: str
    nbytes: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Kind:
    """Modules that are alike, summed."""

    kind: str
    count: int
    bits: float | None
    group_size: int
    stored: str
    nbytes: int
    exact: bool

    @property
    def described(self) -> str:
        """ "210 linear: 4 bits, groups of 64"."""
        if self.bits is None:
            return f"{self.count} {self.kind}: packed as {self.stored}"
        bits = f"{'' if self.exact else 'about '}{self.bits:.3g} bits" + ("" if self.exact else ", scales and all")
        return f"{self.count} {self.kind}: {bits}" + (
            f", groups of {self.group_size}" if self.group_size else f" ({self.stored})"
        )


def modules_in_folder(tensors: Mapping[str, StoredTensor], facts: ModelFacts, plan: BitPlan | None) -> list[ModuleBits]:
    """The modules that the tensors of a folder belong to, in the files' order.

    Args:
        facts: names and shapes of the modules, where they are known.
        plan: the bits of those that are packed, where a plugin could tell.
    """
    known = {module.name: module for module in facts.modules}
    owned: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        owner = _owner(name, known)
        owned[owner][name[len(owner) + 1 :]] = tensor
    found: list[ModuleBits] = []
    for owner, parts in owned.items():
        fact = known.get(owner)
        plain = parts.keys() <= {"weight", "bias", ""}
        if fact is None and not plain and not _has_packed(parts):
            found += _tensors(owner, parts)
            continue
        nbytes = sum(tensor.nbytes for tensor in parts.values())
        weight = parts.get("weight") or max(parts.values(), key=lambda tensor: tensor.nbytes)
        packed = weight.dtype not in _FLOATS or not plain
        shape = fact.shape if fact else () if packed else weight.shape
        kind = _kind(owner, shape, fact.kind if fact else "linear" if packed else "")
        if not packed:
            found.append(ModuleBits(owner, kind, shape, _FLOATS[weight.dtype], 0, weight.dtype, nbytes))
        elif plan is not None and plan.of(owner)[0] < 16:
            bits, group = plan.of(owner)
            found.append(ModuleBits(owner, kind, shape, bits, group, weight.dtype, nbytes))
        else:
            held = nbytes - (parts["bias"].nbytes if "bias" in parts else 0)
            about = 8 * held / math.prod(shape) if shape else None
            found.append(ModuleBits(owner, kind, shape, about, 0, weight.dtype, nbytes, exact=False))
    return found


def _has_packed(parts: Mapping[str, StoredTensor]) -> bool:
    return any(tensor.dtype not in _NEVER_PACKED for part, tensor in parts.items() if part not in _BUFFERS)


def _tensors(owner: str, parts: Mapping[str, StoredTensor]) -> Iterator[ModuleBits]:
    """Of a module that is none of the known kinds, one by one: fused experts, buffers."""
    for part, tensor in parts.items():
        kind = "experts" if "experts" in owner.split(".") else "buffer" if part in _BUFFERS else "other"
        bits = 8 * tensor.nbytes / max(tensor.numbers, 1)
        yield ModuleBits(f"{owner}.{part}", kind, tensor.shape, bits, 0, tensor.dtype, tensor.nbytes)


def modules_in_gguf(tensors: Mapping[str, StoredTensor]) -> list[ModuleBits]:
    """As `modules_in_folder`, with the names that the file has. A type's scales are counted in its bits."""
    found = []
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if part == "bias":
            continue
        bias = tensors.get(f"{owner}.bias")
        nbytes = tensor.nbytes + (bias.nbytes if bias else 0)
        bits = 8 * tensor.nbytes / max(tensor.numbers, 1)
        kind = "head" if owner == "output" else _kind(owner, tensor.shape, "")
        found.append(ModuleBits(owner, kind, tensor.shape, bits, 0, tensor.dtype, nbytes))
    return found


def summed(modules: Iterable[ModuleBits]) -> list[Kind]:
    """Alike modules together, the linear ones first, then by bytes."""
    alike: dict[tuple[object, ...], list[ModuleBits]] = defaultdict(list)
    for module in modules:
        told = (module.bits, module.group_size) if module.exact else None
        alike[module.kind, told, module.stored].append(module)
    kinds = []
    for same in alike.values():
        one, nbytes = same[0], sum(module.nbytes for module in same)
        kinds.append(Kind(one.kind, len(same), _mean_bits(same), one.group_size, one.stored, nbytes, one.exact))
    return sorted(kinds, key=lambda each: (each.kind != "linear", -each.nbytes))


def _mean_bits(modules: Iterable[ModuleBits]) -> float | None:
    """Of their weights; of modules whose bits were told they are all the same."""
    known = [(module.bits, math.prod(module.shape)) for module in modules]
    if any(bits is None for bits, _ in known):
        return None
    return sum((bits or 0) * weights for bits, weights in known) / max(sum(weights for _, weights in known), 1)


def _owner(tensor: str, known: Mapping[str, object]) -> str:
    """The module that a tensor is part of: packed ones have several ("q_proj.qweight", "q_proj.weight.absmax")."""
    parts = tensor.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in known:
            return ".".join(parts[:end])
    return (tensor.partition(".weight")[0] if ".weight" in tensor else tensor.rpartition(".")[0]) or tensor


def _kind(name: str, shape: tuple[int, ...], fact: str) -> str:
    last = name.rpartition(".")[2]
    if is_output_head(name):
        return "head"
    if fact:
        return fact
    if len(shape) == 2:
        return "embedding" if any(part in last for part in _EMBEDDINGS) else "linear"
    return "norm" if len(shape) == 1 else "other"
