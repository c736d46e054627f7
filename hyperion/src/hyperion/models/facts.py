"""What is known of a base model without loading it: read from headers, or from config.json by formula. No torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hyperion_core.errors import ModelError
from hyperion_core.facts import ModelFacts, ModuleFact, is_output_head

from .families import FAMILIES, missing_keys, modules_by_formula, tied
from .gguf_header import ArrayLength, GGUFHeader, read_header
from .source import BaseModelSource

_EMBEDDINGS = {"embed_tokens", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings", "position_embeddings"}
_EMBEDDINGS |= {"tok_embeddings", "embeddings", "embedding", "shared", "tokens_embed", "positions_embed"}
# Their Conv1D layers hold the weight as (in, out).
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt"})
# Constants that old checkpoints carry beside the weights: rotary frequencies and causal masks.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias)$|\b(attn|attention)\.bias$")
# safetensors' types whose numbers are whole bytes; the size of a tensor of another type stays unchecked.
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_LAYER_AT_TOP = re.compile(r"(layers|h|blocks)\.\d+\.")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")

# transformers' name of a GGUF architecture, where both call the same modules by one table.
_GGUF_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_GGUF_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GGUF_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GGUF_EXCEPTIONS = {"phi3": {"ffn_up": "mlp.gate_up_proj"}, "gemma2": _GGUF_GEMMA, "gemma3": _GGUF_GEMMA}


def model_facts(source: BaseModelSource) -> ModelFacts:
    """The modules of a base model, or `why_unknown`. Reads headers and config.json only; takes milliseconds.

    The output head is left out when it shares its weight with the embedding.

    Raises:
        ModelError: config.json or a header cannot be read, or the model is no causal language model.
    """
    if source.path is None:
        return ModelFacts(source.name, why_unknown="the model is not local")
    if source.kind == "gguf":
        return _from_gguf(source.name, read_header(source.path))
    return _from_folder(source.name, source.path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: it is not there, is not JSON, or holds no mapping.
    """
    return read_json(folder / "config.json")


def check_causal_lm(config: Mapping[str, Any], name: str) -> None:
    """Refuses a model that its config.json declares to be something else than a causal language model.

    Raises:
        ModelError: see above. A config that declares nothing passes.
    """
    architectures = config.get("architectures") or ()
    if config.get("is_encoder_decoder"):
        why = "it is an encoder-decoder model"
    elif architectures and not any(str(each).endswith(_CAUSAL) for each in architectures):
        why = f"its config.json says {', '.join(map(str, architectures))}"
    else:
        return
    raise ModelError(
        f"base model {name!r} is not a causal language model",
        why=why,
        fix="choose a model whose config.json names a ...ForCausalLM architecture",
    )


def _from_folder(name: str, folder: Path) -> ModelFacts:
    config = read_config(folder)
    check_causal_lm(config, name)
    if "text_config" in config:
        return ModelFacts(name, _model_type(config), why_unknown="the model has several parts (text, vision, ...)")
    if _mixture_of_experts(config):
        return ModelFacts(
            name,
            _model_type(config),
            why_unknown="a mixture of experts: its files name the experts' weights otherwise than its modules",
        )
    # A quantized checkpoint stores packed tensors, not the shapes of the modules.
    tensors = _safetensors_shapes(folder)  # which refuses damaged headers
    if config.get("quantization_config"):
        tensors = None
    if tensors:
        modules, why = _from_tensors(tensors, config)
    elif _model_type(config) not in FAMILIES:
        modules, why = (), f"no weights to look at, and the family {_model_type(config)!r} is not known by formula"
    elif absent := missing_keys(config):
        modules, why = (), f"config.json does not say {', '.join(absent)}"
    else:
        modules, why = tuple(sorted(modules_by_formula(config), key=_forward_order)), ""
    if not modules:
        return ModelFacts(name, _model_type(config), why_unknown=why)
    return ModelFacts(
        source=name,
        model_type=_model_type(config),
        modules=modules,
        hidden_size=_first_int(config, "hidden_size", "n_embd", "d_model"),
        layers=_first_int(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        vocab_size=_first_int(config, "vocab_size"),
        context_length=_first_int(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        tied_embeddings=not any(is_output_head(module.name) for module in modules),
        attention_heads=_first_int(config, "num_attention_heads", "n_head", "n_heads"),
        stored=str(config.get("dtype") or config.get("torch_dtype") or ""),
    )


def _from_tensors(
    tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[tuple[ModuleFact, ...], str]:
    """Modules from the names and shapes in a checkpoint, or () and why not."""
    model_type = _model_type(config)
    prefix = ""
    if any(_LAYER_AT_TOP.match(name) for name in tensors):
        # Saved from the backbone alone: transformers adds its name on loading.
        prefix = "model." if model_type in FAMILIES else "transformer." if model_type == "gpt2" else ""
        if not prefix:
            return (), f"the checkpoint leaves out the name of the backbone of {model_type!r}"
    weights = {
        name if is_output_head(name.rpartition(".")[0]) else prefix + name: shape
        for name, shape in tensors.items()
        if not _BUFFERS.search(name)
    }
    if tied(config):
        weights = {name: shape for name, shape in weights.items() if not is_output_head(name.rpartition(".")[0])}
    return _modules(weights, transposed=model_type in _CONV1D_TYPES), "the checkpoint holds no tensors"


def _modules(weights: Mapping[str, tuple[int, ...]], transposed: bool = False) -> tuple[ModuleFact, ...]:
    """Merges a module's weight and bias into one fact; a parameter of another name is a fact of its own."""
    modules = []
    for name, shape in weights.items():
        owner, _, kind = name.rpartition(".")
        if kind == "bias" and f"{owner}.weight" in weights:
            continue
        if kind != "weight":
            modules.append(ModuleFact(name, "other", shape))
            continue
        what = _kind(owner, shape)
        if transposed and what == "linear" and not is_output_head(owner):
            shape = shape[::-1]
        modules.append(ModuleFact(owner, what, shape, f"{owner}.bias" in weights))
    return tuple(sorted(modules, key=_forward_order))


def _kind(module: str, shape: tuple[int, ...]) -> Literal["linear", "embedding", "norm", "other"]:
    if len(shape) == 2:
        return "embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "linear"
    return "norm" if len(shape) == 1 else "other"


def _forward_order(module: ModuleFact) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Embeddings, layers by number, what follows them, the head: headers are sorted by name or not at all."""
    numbered = tuple((int(part), "") if part.isdigit() else (-1, part) for part in module.name.split("."))
    in_layer = any(number >= 0 for number, _ in numbered)
    stage = 0 if module.kind == "embedding" else 1 if in_layer else 3 if is_output_head(module.name) else 2
    return stage, numbered


def _safetensors_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Shapes by tensor name from the headers of a model's safetensors files; None when they are not all here."""
    paths = [folder / name for name in shard_names(folder) or ("model.safetensors",)]
    if not paths or not all(path.is_file() for path in paths):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        shapes |= read_safetensors_header(path)
    return shapes


def shard_names(folder: Path) -> tuple[str, ...]:
    """The weight files that the index of a sharded model names; none where there is no index.

    Raises:
        ModelError: the index cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(
            f"{index} is no index of weights",
            why='it has no "weight_map" from names to files',
            fix="download or copy the model again",
        )
    return tuple(sorted(set(weight_map.values())))


def read_safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with path.open("rb") as file:
            start = file.read(24)
            if start.startswith(b"version https://git-lfs"):
                raise ModelError(
                    f"{path} is not a whole safetensors file",
                    why="it is a Git LFS pointer: it names the file to download, and holds none of it",
                    fix="run `git lfs pull` in that repository",
                )
            file.seek(0)
            if len(start) < 8:
                raise ValueError(f"it holds {len(start)} bytes")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if 8 + length + end > path.stat().st_size:
            raise ValueError(f"it is cut short: {path.stat().st_size:,} bytes instead of {8 + length + end:,}")
        for name, entry in tensors.items():
            first, last = entry["data_offsets"]
            wanted = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 0)
            if wanted and last - first != wanted:
                raise ValueError(f"{name} of shape {tuple(entry['shape'])} has {last - first:,} bytes, not {wanted:,}")
        return {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file", why=str(error), fix="download or copy it again"
        ) from error


def _from_gguf(name: str, header: GGUFHeader) -> ModelFacts:
    model_type = _GGUF_TYPES.get(header.architecture)
    if model_type is None:
        return ModelFacts(name, why_unknown=f"the modules of GGUF architecture {header.architecture!r} are not known")
    weights: dict[str, tuple[int, ...]] = {}
    for tensor, shape in header.tensors.items():
        translated = _gguf_parameter(tensor, header.architecture)
        if translated is None:
            return ModelFacts(name, model_type, why_unknown=f"it holds a tensor {tensor!r} of unknown use")
        weights[translated] = shape
    modules = _modules(weights)
    rows = weights.get("model.embed_tokens.weight", (0, 0))[0]
    vocabulary = header.metadata.get("tokenizer.ggml.tokens")
    return ModelFacts(
        source=name,
        model_type=model_type,
        modules=modules,
        hidden_size=int(header.of_architecture("embedding_length") or 0),
        layers=int(header.of_architecture("block_count") or 0),
        vocab_size=rows or (vocabulary.length if isinstance(vocabulary, ArrayLength) else 0),
        context_length=int(header.of_architecture("context_length") or 0),
        tied_embeddings="lm_head.weight" not in weights,
    )


def _gguf_parameter(tensor: str, architecture: str) -> str | None:
    """transformers' parameter name of a GGUF tensor."""
    owner, _, kind = tensor.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    if owner in top:
        return f"{top[owner]}.{kind}"
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", owner):
        table = _GGUF_MODULES | _GGUF_EXCEPTIONS.get(architecture, {})
        if module := table.get(found[2]):
            return f"model.layers.{found[1]}.{module}.{kind}"
    return None


def _mixture_of_experts(config: Mapping[str, Any]) -> bool:
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(isinstance(config.get(key), int) and config[key] > 0 for key in keys) or "ffn_config" in config


def _model_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", ""))


def _first_int(config: Mapping[str, Any], *keys: str) -> int:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)


def read_json(path: Path, fix: str = "download or copy the model again") -> dict[str, Any]:
    """The mapping that a file of a model holds.

    Raises:
        ModelError: it holds none, or cannot be read; `fix` says what to do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read", why=str(error), fix=fix) from error
    return content
