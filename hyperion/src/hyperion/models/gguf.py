"""Converts a GGUF file, once, into a model folder in the cache. Imports torch and transformers when it does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import sha256
from hyperion_core.errors import ModelError
from hyperion_core.foreign import foreign_keys

from .facts import model_facts
from .folder import check_weights
from .gguf_header import GGUFHeader, read_header
from .quiet import quiet_transformers
from .source import BaseModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONVERTED = ("config.json", "tokenizer.json", "tokenizer_config.json", "conversion.json")
_PROBE = "The quick brown fox, 3.14 * 2?\n\tdef f(x): return x  # déjà vu 世界"


def convert_gguf(path: Path, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """A plain safetensors model folder with the values of a GGUF file, its tokenizer and its chat template.

    The folder is `<cache_dir>/models/<name>-<sha256 of the content, 16 digits>`. It appears there whole (written beside
    it, then renamed), and of several processes that want it one converts while the others wait. Weights are stored in
    bfloat16 or float16 where that keeps every value, else in float32.

    Raises:
        ModelError: the file is damaged, the `gguf` package is missing, transformers cannot read the architecture
            without loss, or the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    header = read_header(path)
    check_convertible(path, header)
    if path.stat().st_size > 2**30:
        progress(f"looking for {path.name} in the cache, by its content")
    digest = sha256(path)
    stem = re.sub(r"[^\w.-]+", "-", path.stem)
    target = cache_dir / "models" / f"{stem}-{digest[:16]}"
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"another process is converting {path.name}: waiting for it")
            lock.acquire()
        try:
            if not _is_whole(target):
                _convert_into(target, path, header, digest, progress)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be converted into {target}",
            why=str(error),
            fix="free some space, or set HYPERION_CACHE to a folder that can be written",
        ) from error
    return target


def check_convertible(path: Path, header: GGUFHeader) -> None:
    """Refuses a GGUF file that transformers would not read, or not without loss, as far as its header tells.

    Raises:
        ModelError: see above; or the `gguf` package is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{path} cannot be read: the Python package gguf is not installed",
            why="transformers needs it to read GGUF weights",
            fix="pip install gguf",
        )
    known = foreign_keys("transformers", "integrations/ggml.py", "GGUF_CONFIG_MAPPING")
    if not any(_letters(name) in _letters(header.architecture) for name in known):
        raise ModelError(
            f"{path} is of the architecture {header.architecture!r}",
            why="transformers does not read a GGUF of that architecture",
            fix="use the same model from safetensors: its hub id or folder",
        )
    if int(header.metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"{path} is one of {header.metadata['split.count']} parts of a model",
            why="transformers reads a GGUF only when it is one file",
            fix="join the parts with llama.cpp's `llama-gguf-split --merge`",
        )
    scaling = header.of_architecture("rope.scaling.type")
    if header.architecture != "gpt-oss" and scaling not in (None, "none"):
        raise ModelError(
            f"{path} cannot be converted without loss",
            why=f"it scales its rotary positions ({scaling}), which transformers does not read from a GGUF",
            fix="use the same model from safetensors: its hub id or folder",
        )


def _letters(architecture: str) -> str:
    return re.sub(r"[^a-z0-9]", "", architecture.lower())


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there with all its files. One that a disk or a hand has damaged is not."""
    try:
        for name in _CONVERTED:
            json.loads((folder / name).read_text(encoding="utf-8"))
        check_weights(folder, folder.name, (path.name for path in folder.iterdir()))
        model_facts(BaseModelSource(folder.name, "local", folder, None))  # reads the headers of the weights
    except (ModelError, OSError, ValueError):
        return False
    return True


def _convert_into(target: Path, path: Path, header: GGUFHeader, digest: str, progress: Callable[[str], None]) -> None:
    """Converts into a folder beside `target` and renames it. The caller holds the lock, so every other such folder
    was left behind by a process that died."""
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(leftover)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    if target.exists():
        progress(f"the converted model in {target} is damaged: it is made again")
        shutil.rmtree(target)
    progress(f"converting {path.name} ({path.stat().st_size / 2**20:.0f} MiB), once; this can take a minute")
    try:
        with quiet_transformers():
            model, tokenizer = _read(path, header)
            dtype = _save(model, tokenizer, header, partial)
            _verify(partial, model, tokenizer, dtype)
        _write_record(partial, path, digest, dtype)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    progress(f"converted into {target}")


def _read(path: Path, header: GGUFHeader) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, as transformers reads them; refused when any weight was left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except OSError:
        raise
    except Exception as error:  # transformers raises whatever its reading of somebody's file ran into
        raise ModelError(
            f"{path} cannot be read by transformers",
            why=f"{type(error).__name__}: {error}",
            fix=f"architecture {header.architecture!r} may be unsupported: use the model from safetensors instead",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    filled = sum(parameter.numel() for parameter in model.parameters())
    if missing or filled != header.parameters:
        raise ModelError(
            f"{path} cannot be converted without loss",
            why=f"transformers fills {filled:,} parameters from it, and it holds {header.parameters:,}"
            + (f"; not found: {', '.join(missing[:5])}" if missing else ""),
            fix="use the same model from safetensors: its hub id or folder",
        )
    return model, tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: GGUFHeader, folder: Path) -> torch.dtype:
    """Writes a plain model, since one loaded from a GGUF is marked as quantized and not saved. Returns its dtype."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    state = model.state_dict()
    dtype = _exact_dtype(state)
    values = model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        values.pop(key, None)
    config = type(model.config).from_dict(values)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    plain.tie_weights()
    ends = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops[0] if len(stops) == 1 else stops or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for the owner alone; a shared cache is for all
        shutil.copymode(folder / "config.json", weights)
    tokenizer.save_pretrained(folder)
    return dtype


def _exact_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in state.values()):
            return dtype
    return torch.float32


def _verify(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Loads what was written and compares it with what was read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    before, after = model.state_dict(), saved.state_dict()
    different = sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name].to(before[name].dtype))
    )
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    probe = _PROBE + "".join(map(str, tokenizer.all_special_tokens))
    if again.encode(probe) != tokenizer.encode(probe) or again.chat_template != tokenizer.chat_template:
        different.append("the tokenizer")
    if different:
        raise ModelError(
            "the converted model differs from the GGUF file that it was made of",
            why=f"after saving and loading, these differ: {', '.join(different[:5])}",
            fix="use the same model from safetensors, and report this: it is a fault of the conversion",
        )


def _write_record(folder: Path, path: Path, digest: str, dtype: torch.dtype) -> None:
    from importlib.metadata import version

    record: dict[str, Any] = {
        "source": path.name,
        "sha256": digest,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("transformers", "gguf", "torch")},
    }
    (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
