"""An adapter's folder: PEFT's files, an artifact's, or a checkpoint's of a run. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperion_core.artifact import ADAPTER
from hyperion_core.errors import ModelError

from ..models.facts import read_json
from .tensors import StoredTensor, safetensors_of

PEFT_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class AdapterPart:
    """`targets` counts the modules that it acts on by the last part of their names, `ranks` those of each rank.
    `owner` is the plugin that made it, with its version; `quantization` the options that its base was held with."""

    type: str
    base_model: str
    revision: str | None
    ranks: Mapping[int, int]
    alpha: float | None
    targets: Mapping[str, int]
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    owner: str = ""
    quantization: Mapping[str, Any] | None = None
    new_tokens: tuple[str, ...] = ()
    unread: tuple[str, ...] = field(default=())


def holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER, PEFT_CONFIG))


def adapter_in(folder: Path) -> AdapterPart:
    """The adapter in a folder.

    Raises:
        ModelError: a file is damaged, or the weights are missing.
    """
    ours = read_json(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
    peft = read_json(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).is_file() else {}
    files = sorted(folder.glob("adapter*.safetensors")) or sorted(folder.glob("*.safetensors"))
    pickles = tuple(sorted(path.name for path in folder.glob("adapter*") if path.suffix in _PICKLES))
    if not files and not pickles:
        raise ModelError(
            f"{folder} says what an adapter is, and does not hold it",
            why="there is no adapter_model.safetensors",
            fix="copy the adapter again, all of its files",
        )
    tensors = {name: tensor for path in files for name, tensor in safetensors_of(path).items()}
    config = {**peft, **_mapping(ours.get("config"))}
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    quantization = ours.get("quantization")
    return AdapterPart(
        type=str(ours.get("type") or peft.get("peft_type") or "unknown").lower(),
        base_model=str(ours.get("base_model") or peft.get("base_model_name_or_path") or ""),
        revision=ours.get("revision") or peft.get("revision"),
        ranks=_ranks(tensors),
        alpha=config.get("lora_alpha"),
        targets=_targets(tensors, config.get("target_modules")),
        parameters=sum(tensor.numbers for tensor in tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes=dict(sizes),
        owner=" ".join(str(ours[key]) for key in ("distribution", "version") if ours.get(key)),
        quantization=quantization if isinstance(quantization, Mapping) else None,
        new_tokens=tuple(map(str, ours.get("new_tokens") or ())),
        unread=pickles if not files else (),
    )


def _ranks(tensors: Mapping[str, StoredTensor]) -> dict[int, int]:
    """Of what is low-rank: the rows of each lora_A."""
    found: Counter[int] = Counter()
    for name, tensor in tensors.items():
        if ".lora_A" in name and len(tensor.shape) == 2:
            found[tensor.shape[0]] += 1
    return dict(sorted(found.items()))


def _targets(tensors: Iterable[str], named: Any) -> dict[str, int]:
    """Modules with tensors of the adapter, by the last part of their names."""
    known = set(named) if isinstance(named, list) else set()
    owners = set()
    for name in tensors:
        parts = name.split(".")
        ends = [index for index, part in enumerate(parts) if part.startswith(("lora_", "ia3_")) or part in known]
        if ends:
            end = ends[0] + (parts[ends[0]] in known)
            owners.add(".".join(parts[:end]))
    return dict(Counter(owner.rpartition(".")[2] for owner in sorted(owners)).most_common())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
