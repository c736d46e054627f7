"""Keys, values and second feed-forward projections of a causal language model, by names and shapes. Torch-free.

Names differ between families, shapes do not: the second feed-forward projection is the linear module of a layer,
outside its attention, that leads back to the model's width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hyperion_core.facts import ModelFacts, ModuleFact, is_output_head

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_KEYS_VALUES = frozenset(
    {
        "k_proj",
        "v_proj",
        "key",
        "value",
        "key_proj",
        "value_proj",
        "k",
        "v",
        "wk",
        "wv",
        "to_k",
        "to_v",
        "k_lin",
        "v_lin",
        "lin_k",
        "lin_v",
    }
)
# Where queries, keys and values are one module, it is scaled as a whole, as PEFT does.
_FUSED = frozenset(
    {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "wqkv", "W_pack", "qkv_lin", "att_proj"}
)
_ATTENTION_OUT = frozenset({"o_proj", "out_proj", "dense", "out", "wo", "to_out", "out_lin", "attn_out"})
_SECOND = frozenset(
    {
        "down_proj",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "w2",
        "wo",
        "c_proj",
        "ff_out",
        "lin2",
        "output_linear",
        "ffn_down",
        "proj_2",
    }
)


def attention_modules(facts: ModelFacts) -> list[ModuleFact]:
    """Keys and values, or the module that holds them."""
    linear = _in_layers(facts)
    apart = [module for module in linear if _last(module) in _KEYS_VALUES]
    return apart or [module for module in linear if _last(module) in _FUSED]


def feedforward_modules(facts: ModelFacts, among: Iterable[ModuleFact] | None = None) -> list[ModuleFact]:
    """Second feed-forward projections."""
    chosen = _in_layers(facts) if among is None else list(among)
    return [module for module in chosen if _is_second(module, facts.hidden_size)]


def _is_second(module: ModuleFact, width: int) -> bool:
    parent, _, last = module.name.rpartition(".")
    if module.kind != "linear" or is_output_head(module.name):
        return False
    if _ATTENTION.search(parent) or last in _KEYS_VALUES | _FUSED:
        return False
    out, into = module.shape
    if out != width:
        return False
    return last in _SECOND or (into > width and last not in _ATTENTION_OUT)


def _in_layers(facts: ModelFacts) -> list[ModuleFact]:
    return [module for module in facts.linear() if re.search(r"\.\d+\.", module.name)]


def _last(module: ModuleFact) -> str:
    return module.name.rpartition(".")[2]
