"""Whether a model folder is whole and fits together, by its file names, headers and json: no weight is read.

What a load would run into after minutes is found while planning, without torch.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hyperion_core.errors import ModelError
from hyperion_core.facts import ModelFacts
from hyperion_core.suggest import closest

from .facts import read_config, read_json, shard_names
from .families import FAMILIES, missing_keys, modules_by_formula
from .source import BaseModelSource, check_model_folder

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
)
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.spm", "*.tiktoken")
# Larger ones are read when the tokenizer is loaded: reading them here would take a second.
_LARGEST_TOKENIZER = 32 * 2**20
_KINDS_OF_TOKENIZER = ("BPE", "WordPiece", "WordLevel", "Unigram")
_COPY = "copy or download the whole model again"
_TOGETHER = "copy or download the model again; weights and config.json must belong together"


def check_folder(source: BaseModelSource, facts: ModelFacts, *, trust_remote_code: bool) -> None:
    """Refuses a model folder, or a cached snapshot of one, that cannot be loaded.

    Args:
        source, facts: the model, and what `model_facts` says of it.

    Raises:
        ModelError: config.json contradicts itself or the weights, transformers does not know the architecture, or a
            file is missing or damaged.
    """
    assert source.path is not None and source.kind != "gguf"
    config = read_config(source.path)
    _check_architecture(config, source.name, trust_remote_code)
    _check_sizes(config, source.name)
    if source.kind == "local":  # of a hub model, files may still be missing in the cache: a run fetches them
        check_weights(source.path, source.name, (entry.name for entry in source.path.iterdir()))
        _check_shards(source.path, source.name)
        _check_tokenizer(source.path, source.name, facts)
    _check_shapes(config, facts, source.name)


def check_weights(folder: Path, name: str, names: Iterable[str]) -> None:
    """Refuses a model whose files, listed in `names`, hold no safetensors, and says what they hold instead."""
    known = set(names)
    check_model_folder(folder, name)
    if any(each.endswith(".safetensors") for each in known):
        return
    if pickles := sorted(each for each in known if each.endswith(_PICKLES)):
        why = f"it has pickled weights only ({pickles[0]}), and loading a pickle can run any code in it"
        fix = "choose a model or a revision with .safetensors files, or have it converted (many hub models have a "
        fix += "pull request that does: revision: refs/pr/<number>)"
    elif ggufs := sorted(each for each in known if each.endswith(".gguf")):
        why = f"it has GGUF files only ({ggufs[0]})"
        fix = f"name one file: base_model: ./{ggufs[0]}"
    else:
        why, fix = "it has no weights", "copy or download the whole model"
    raise ModelError(f"base model {name!r} has no .safetensors weights: {folder}", why=why, fix=fix)


def some(names: Iterable[str], most: int = 6) -> str:
    """The first few of many names."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def _check_architecture(config: Mapping[str, Any], name: str, trust_remote_code: bool) -> None:
    known = _model_types()
    model_type = config.get("model_type")
    own_code = "auto_map" in config
    if not known or model_type in known or (own_code and trust_remote_code):
        return
    if own_code:
        raise ModelError(
            f"base model {name!r} brings Python code of its own",
            why=f"transformers itself does not know its model_type {model_type!r}",
            fix="set trust_remote_code: true if you have read the code, or trust its author",
        )
    if not model_type:
        raise ModelError(
            f"base model {name!r}: its config.json does not say model_type",
            why="it names the architecture that the weights are for",
            fix=_COPY,
        )
    guess = closest(str(model_type), known)
    raise ModelError(
        f"base model {name!r} is of an unknown architecture: model_type {model_type!r}",
        why="the installed transformers does not know it",
        fix=(f'did you mean "{guess}"? If not: ' if guess else "") + "python -m pip install -U transformers",
    )


@functools.cache
def _model_types() -> frozenset[str]:
    """What the installed transformers may know as a model_type: every name in its tables. Empty when they are not
    found."""
    spec = importlib.util.find_spec("transformers")
    tables = ("auto_mappings.py", "configuration_auto.py")
    files = [
        Path(folder, "models/auto", file)
        for folder in (spec and spec.submodule_search_locations) or ()
        for file in tables
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    return frozenset(re.findall(r"""["']([\w.-]+)["']""", text))


def _check_sizes(config: Mapping[str, Any], name: str) -> None:
    what = f"base model {name!r}: its config.json contradicts itself"
    for key in _SIZES:
        value = config.get(key)
        if isinstance(value, str) or (isinstance(value, (int, float)) and value <= 0):
            raise ModelError(what, why=f"{key} is {value!r}, and must be a number above 0", fix=_COPY)
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return
    if absent := missing_keys(config):
        raise ModelError(
            f"base model {name!r}: its config.json does not say {', '.join(absent)}",
            why="transformers would take the sizes of another model instead",
            fix=_COPY,
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if not (config.get("head_dim") or family.defaults.get("head_dim")) and width % heads:
        raise ModelError(what, why=f"hidden_size {width} is no multiple of num_attention_heads {heads}", fix=_COPY)
    if heads % kv_heads:
        raise ModelError(
            what, why=f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", fix=_COPY
        )


def _check_shards(folder: Path, name: str) -> None:
    """Every file that the index of a sharded model names must be there."""
    shards = shard_names(folder)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelError(
            f"base model {name!r} lacks {len(missing)} of its {len(shards)} weight files: {some(missing)}",
            why="model.safetensors.index.json names them",
            fix=_COPY,
        )


def _check_tokenizer(folder: Path, name: str, facts: ModelFacts) -> None:
    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        raise ModelError(
            f"base model {name!r} has no tokenizer: {folder}",
            why=f"there is none of {', '.join(_TOKENIZERS)}",
            fix="copy tokenizer.json and tokenizer_config.json from the model's origin",
        )
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (folder / file).is_file():
            read_json(folder / file, _COPY)
    path = folder / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER:
        return
    content = read_json(path, _COPY)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ModelError(f"{path} is no tokenizer", why='it has no "model"', fix=_COPY)
    if model.get("type", "BPE") not in _KINDS_OF_TOKENIZER:
        raise ModelError(
            f"{path} is a tokenizer of an unknown kind: {model['type']!r}",
            why=f"the tokenizers library knows {', '.join(_KINDS_OF_TOKENIZER)}",
            fix=_COPY,
        )
    rows = next((module.shape[0] for module in facts.modules if module.kind == "embedding"), 0)
    tokens = _token_count(model.get("vocab"), content.get("added_tokens"))
    if rows and tokens > rows:
        raise ModelError(
            f"the tokenizer of {name!r} has {tokens:,} tokens and the model has rows for {rows:,}",
            why="tokenizer and model do not belong together",
            fix="use the tokenizer that came with the model",
        )


def _token_count(vocabulary: Any, added: Any) -> int:
    """Of a tokenizer.json: its model's vocabulary ({text: id}, or [[text, score]]) and the tokens added to it."""
    if isinstance(vocabulary, list):
        known = {entry[0] for entry in vocabulary if isinstance(entry, list) and entry and isinstance(entry[0], str)}
    else:
        known = set(vocabulary) if isinstance(vocabulary, dict) else set()
    extra = added if isinstance(added, list) else []
    return len(known | {str(token["content"]) for token in extra if isinstance(token, dict) and "content" in token})


def _check_shapes(config: Mapping[str, Any], facts: ModelFacts, name: str) -> None:
    """The weights' names and shapes against those that config.json asks for, in families known by formula."""
    if not facts.known or facts.model_type not in FAMILIES or config.get("quantization_config"):
        return
    found = {module.name: module.shape for module in facts.modules}
    wanted = {module.name: module.shape for module in modules_by_formula(config)}
    if missing := [module for module in wanted if module not in found]:
        raise ModelError(f"base model {name!r}: weights are missing", why=f"there is no {some(missing)}", fix=_TOGETHER)
    if other := [module for module, shape in wanted.items() if found[module] != shape]:
        shapes = (f"{module} {found[module]} instead of {wanted[module]}" for module in other)
        raise ModelError(
            f"base model {name!r}: weights have other shapes than config.json says", why=some(shapes), fix=_TOGETHER
        )
