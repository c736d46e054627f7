"""The count of what autograd keeps, against what it really keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hyperion_core.facts import ModelFacts, ModuleFact

from hyperion.optimization.memory_model import Held, Step, kept_bytes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["down_proj"]])
@pytest.mark.parametrize(
    ("shape", "tokens", "documents"),
    [((48, 80, 2, 4, 2), 60, 2), ((64, 96, 3, 4, 4), 300, 1), ((32, 48, 1, 2, 1), 33, 3), ((32, 48, 2, 2, 2), 600, 1)],
)
def test_what_autograd_keeps_is_counted_to_the_byte(
    dtype: str, targets: list[str], shape: tuple[int, ...], tokens: int, documents: int
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from hyperion_core.testing.tiny import tiny_llama

    from hyperion.acceleration.documents import packed
    from hyperion.acceleration.fused import fused
    from hyperion.acceleration.packing import attending_within_documents
    from hyperion.engine.loss import supervised_logprobs

    hidden, inner, layers, heads, groups = shape
    base = tiny_llama(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                      num_key_value_heads=groups, max_position_embeddings=1024)  # fmt: skip
    model, facts, names, trained = _with_adapter(base.to(getattr(torch, dtype)), targets, heads)
    rows = [{"input_ids": [number + 1, *range(5, tokens // documents + 4)]} for number in range(documents)]
    for row in rows:
        row["input_ids"] = [each % 250 for each in row["input_ids"]]
        row["labels"] = row["input_ids"]
    batch = packed(rows)
    outside = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    outside |= {t.untyped_storage().data_ptr() for t in batch.values() if isinstance(t, torch.Tensor)}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = tensor
        return tensor

    with (
        fused(model), attending_within_documents(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):  # fmt: skip
        loss = supervised_logprobs(model, batch).logps.sum()
    assert loss.requires_grad
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    step = Step(tokens, tokens // documents, dtype)
    assert kept_bytes(facts, Held(0, trained, names), step) == counted


def _with_adapter(base: Any, targets: list[str], heads: int) -> tuple[Any, ModelFacts, tuple[str, ...], int]:
    """LoRA as the plugin attaches it: float32 on a base of any type."""
    from peft import LoraConfig, get_peft_model

    pytest.importorskip("hyperion_peft")
    from torch import nn

    from hyperion_peft.fast_linear import speed_up

    modules = tuple(
        ModuleFact(name, "linear", tuple(m.weight.shape))
        for name, m in base.named_modules()
        if isinstance(m, nn.Linear)
    )
    names = tuple(m.name for m in modules if m.name.rpartition(".")[2] in targets)
    hidden = base.config.hidden_size
    facts = ModelFacts("tiny", modules=modules, hidden_size=hidden, layers=len(base.model.layers),
                       vocab_size=base.config.vocab_size, attention_heads=heads)  # fmt: skip
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    speed_up(model)
    model.train()
    return model, facts, names, sum(p.numel() for p in trainable)
