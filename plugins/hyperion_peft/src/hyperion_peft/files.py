"""An adapter's files, in PEFT's format: adapter_config.json and adapter_model.safetensors. Loaded only with torch.

Written here and not by `save_pretrained`, which asks the hub whether the vocabulary was resized, puts an adapter that
is not called "default" into a folder of its own, and writes sets in no order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hyperion_core.artifact import read_json, write_json
from hyperion_core.errors import ArtifactError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .attach import adapter_config, base_of, declared, state_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


def save(
    model: nn.Module,
    name: str,
    folder: Path,
    instead: Mapping[str, torch.Tensor] | None = None,
    marks: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write exactly the tensors of `name`; each file whole or not at all.

    Args:
        instead: tensors by key that take the place of those that the adapter computes with.
        marks: what a reader is told of the tensors; `read_marks` gives it back.
    """
    config = adapter_config(model, name)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = state_of(model).tuned_biases if state_of(model).bias_owner == name else {}
    found = {t.key: waiting[t.name] if t.name in waiting else t.value() for t in declared(model, name)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in {**found, **(instead or {})}.items()}
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    content["inference_mode"] = True  # what plain peft makes of it is for use; training is asked for when loading
    write_json(folder / CONFIG, dict(sorted(content.items())))
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt", **(marks or {})})
    shutil.copymode(folder / CONFIG, partial)  # safetensors writes for the owner alone, whatever the umask says
    os.replace(partial, folder / WEIGHTS)
    return [folder / CONFIG, folder / WEIGHTS]


def read_config(folder: Path, peft_type: str) -> PeftConfig:
    """adapter_config.json as a config of the installed peft.

    Raises:
        ArtifactError: not there, not readable, of another method, or with options that this peft does not know.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"{folder} holds no adapter in PEFT's format",
            why=f"it has no {CONFIG}",
            fix="give the folder of an adapter: a run's output_dir, or what save_pretrained wrote",
        )
    content = read_json(path)
    content.pop("runtime_config", None)
    found = content.get("peft_type")
    if found != peft_type:
        raise ArtifactError(
            f"{folder} holds a {found} adapter, not {peft_type}",
            why=f"{CONFIG} says so",
            fix=f"load it with the plugin for {found}",
        )
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[found]
    known = kind.__dataclass_fields__
    strange = sorted(key for key, value in content.items() if key not in known and value)
    if strange:
        raise ArtifactError(
            f"{path} has options that the installed peft does not know: {', '.join(strange)}",
            why=f"it was written by peft {content.get('peft_version') or 'of another version'}",
            fix="python -m pip install --upgrade peft",
        )
    try:
        return kind(**{key: value for key, value in content.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be used", why=str(error), fix="restore the file") from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of adapter_model.safetensors, on the CPU.

    Raises:
        ArtifactError: not there, a pickle instead, or damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / _PICKLED).is_file()
        raise ArtifactError(
            f"{folder} has no {WEIGHTS}",
            why=f"{_PICKLED} is a pickle, which can run code as it is read" if pickled else "the adapter is not whole",
            fix="save it again with a current peft: model.save_pretrained(folder)" if pickled else "restore the file",
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read", why=str(error), fix="restore the file") from error


def read_marks(folder: Path) -> dict[str, str]:
    """What was said of the tensors of a file that `read_tensors` takes."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict(file.metadata() or {})


def fill(model: nn.Module, name: str, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy the tensors of a file into the attached adapter `name`.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape; nothing is copied then.
    """
    wanted = {tensor.key: tensor.parameter for tensor in declared(model, name)}
    wrong = [f"{key}: missing in the file" for key in wanted if key not in tensors]
    for key, value in tensors.items():
        if key not in wanted:
            if not _is_bases_own(model, key, value):
                wrong.append(f"{key}: not wanted by this base and config")
        elif value.shape != wanted[key].shape:
            wrong.append(f"{key}: {_shape(value)} in the file, {_shape(wanted[key])} for this base")
    if wrong:
        base = adapter_config(model, name).base_model_name_or_path
        raise ArtifactError(
            f"the adapter in {folder} does not fit this base",
            why=_first(wrong),
            fix=f"load it on the base that it was trained on: {base}" if base else "load it on its own base model",
        )
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def _is_bases_own(model: nn.Module, key: str, value: torch.Tensor) -> bool:
    """peft also saves whole embeddings that LoRA wraps: harmless where they are the base's own, bit for bit."""
    path = key.removeprefix("base_model.model.")
    try:
        own = base_of(model).get_parameter(path)
    except AttributeError:
        return False
    return own.shape == value.shape and torch.equal(own.detach().cpu(), value.to(own.dtype))


def _first(lines: Iterable[str], most: int = 5) -> str:
    every = list(lines)
    more = [f"and {len(every) - most} more"] if len(every) > most else []
    return "\n".join([*every[:most], *more])


def _shape(value: torch.Tensor) -> str:
    return "×".join(str(size) for size in value.shape)


def public_base_name(plan_config: Mapping[str, Any], model: nn.Module) -> str | None:
    """The base's name for adapter_config.json: as the user wrote it, never an absolute path of this machine."""
    written = plan_config.get("base_model") or getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(written) if written and not os.path.isabs(str(written)) and not str(written).startswith("~") else None
