"""Bases of random weights in the shapes of known models: speed and memory do not depend on what a weight is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip


def write_base(folder: Path, shape: Mapping[str, int], tokenizer: Path) -> int:
    """A Llama of random bfloat16 weights, a file a layer, with the tokenizer of another folder; gives the weights'
    bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16", pad_token_id=0).save_pretrained(folder)
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
        for file in tokenizer.glob(pattern):
            shutil.copy(file, folder)
    wide, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = wide // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (keys, wide), "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, wide), "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
    }  # fmt: skip
    ends = {"model.embed_tokens.weight": (shape["vocab_size"], wide), "lm_head.weight": (shape["vocab_size"], wide)}
    files = [{name: torch.randn(size).mul_(0.02).bfloat16() for name, size in ends.items()}]
    files[0]["model.norm.weight"] = torch.ones(wide, dtype=torch.bfloat16)
    index, total = {}, 0
    for number in range(-1, shape["num_hidden_layers"]):
        if number >= 0:
            prefix = f"model.layers.{number}"
            files.append({f"{prefix}.{n}.weight": torch.randn(s).mul_(0.02).bfloat16() for n, s in layer.items()})
            for norm in ("input_layernorm", "post_attention_layernorm"):
                files[-1][f"{prefix}.{norm}.weight"] = torch.ones(wide, dtype=torch.bfloat16)
        tensors, name = files.pop(), f"model-{number + 2:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")
    return total
