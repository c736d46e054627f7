"""The modules of Llama-like model families, by formula from config.json.

Only families whose modules a test compares, name by name and shape by shape, with the ones that transformers builds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hyperion_core.facts import ModuleFact

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from Llama.

    `defaults` are the values of config keys that a config.json may leave out. A bias is True, False, or the config key
    that decides. `qk_norm`: queries and keys are normalised over a head, or over all heads at once.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: bool = True
    qk_norm: Literal["head", "width"] | None = None
    qkv_bias: str | bool = "attention_bias"
    output_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_OLMO_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GLM = {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias="mlp_bias"),
    "mistral": Family({"num_key_value_heads": 8}, qkv_bias=False, output_bias=False),
    "ministral3": Family({"num_key_value_heads": 8, "head_dim": 128}, qkv_bias=False, output_bias=False),
    "qwen2": Family({"num_key_value_heads": 32}, qkv_bias=True, output_bias=False),
    "qwen3": Family({"num_key_value_heads": 32, "head_dim": 128}, qk_norm="head"),
    "gemma": Family({**_GEMMA, "num_key_value_heads": 16}),
    "gemma2": Family({**_GEMMA, "num_key_value_heads": 4}, norms=_GEMMA_NORMS),
    "gemma3_text": Family({**_GEMMA, "num_key_value_heads": 4}, norms=_GEMMA_NORMS, qk_norm="head"),
    "smollm3": Family({"num_key_value_heads": 4, "tie_word_embeddings": True}, mlp_bias="mlp_bias"),
    "phi3": Family(qkv_bias=False, output_bias=False, fused_qkv=True, fused_gate_up=True),
    "granite": Family(mlp_bias="mlp_bias"),
    "olmo": Family(norms=(), final_norm=False),
    "olmo2": Family(norms=_OLMO_NORMS, qk_norm="width"),
    "olmo3": Family(norms=_OLMO_NORMS, qk_norm="width"),
    "cohere2": Family({"tie_word_embeddings": True}, norms=("input_layernorm",)),
    "glm": Family(_GLM, output_bias=False, fused_gate_up=True),
    "glm4": Family(
        _GLM,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
        output_bias=False,
        fused_gate_up=True,
    ),
    "ernie4_5": Family(
        {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
    ),
    "seed_oss": Family(
        {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
}


def missing_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of config.json that the formula needs and that are not there as positive integers."""
    return tuple(key for key in _REQUIRED if not isinstance(config.get(key), int) or config[key] <= 0)


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding, by config.json or the family's default."""
    family = FAMILIES.get(config.get("model_type", ""), Family())
    return bool(config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False)))


def modules_by_formula(config: Mapping[str, Any]) -> tuple[ModuleFact, ...]:
    """Every module with weights of a model of a known family.

    `config` is config.json of a `model_type` in `FAMILIES`, with nothing in `missing_keys(config)`.
    """
    family = FAMILIES[config["model_type"]]
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    modules = [ModuleFact("model.embed_tokens", "embedding", (vocabulary, width))]
    for layer in range(config["num_hidden_layers"]):
        modules += _layer(family, config, f"model.layers.{layer}.")
    if family.final_norm:
        modules.append(ModuleFact("model.norm", "norm", (width,)))
    if not tied(config):
        modules.append(ModuleFact("lm_head", "linear", (vocabulary, width)))
    return tuple(modules)


def _layer(family: Family, config: Mapping[str, Any], prefix: str) -> Iterator[ModuleFact]:
    def bias(rule: str | bool) -> bool:
        return bool(config.get(rule, family.defaults.get(rule, False))) if isinstance(rule, str) else rule

    def linear(name: str, out: int, into: int, rule: str | bool) -> ModuleFact:
        return ModuleFact(prefix + name, "linear", (out, into), bias(rule))

    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", family.defaults.get("num_key_value_heads")) or heads
    head = config.get("head_dim", family.defaults.get("head_dim")) or width // heads

    if family.fused_qkv:
        yield linear("self_attn.qkv_proj", (heads + 2 * kv_heads) * head, width, family.qkv_bias)
    else:
        yield linear("self_attn.q_proj", heads * head, width, family.qkv_bias)
        yield linear("self_attn.k_proj", kv_heads * head, width, family.qkv_bias)
        yield linear("self_attn.v_proj", kv_heads * head, width, family.qkv_bias)
    yield linear("self_attn.o_proj", width, heads * head, family.output_bias)
    if family.qk_norm is not None:
        whole = family.qk_norm == "width"
        yield ModuleFact(prefix + "self_attn.q_norm", "norm", (heads * head if whole else head,))
        yield ModuleFact(prefix + "self_attn.k_norm", "norm", (kv_heads * head if whole else head,))
    if family.fused_gate_up:
        yield linear("mlp.gate_up_proj", 2 * inner, width, family.mlp_bias)
    else:
        yield linear("mlp.gate_proj", inner, width, family.mlp_bias)
        yield linear("mlp.up_proj", inner, width, family.mlp_bias)
    yield linear("mlp.down_proj", width, inner, family.mlp_bias)
    for name in family.norms:
        yield ModuleFact(prefix + name, "norm", (width,))
