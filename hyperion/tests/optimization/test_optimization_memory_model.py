"""The count of what autograd keeps, against what it really keeps."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.facts import Workload

from hyperion.memory import held_before
from hyperion.optimization.memory_model import Step, kept_bytes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = (48, 80, 3, 4, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["down_proj"]])
@pytest.mark.parametrize(
    ("shape", "tokens", "documents"),
    [((48, 80, 2, 4, 2), 60, 2), ((64, 96, 3, 4, 4), 300, 1), ((32, 48, 1, 2, 1), 33, 3), ((32, 48, 2, 2, 2), 600, 1)],
)
def test_what_autograd_keeps_is_counted_to_the_byte(
    dtype: str, targets: list[str], shape: tuple[int, ...], tokens: int, documents: int, tmp_path: Path
) -> None:
    counted, kept = _both({"r": 4, "target_modules": targets}, shape, tokens, documents, dtype, tmp_path)
    assert counted == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.05},
        {"lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "lora_dropout": 0.05, "target_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [2], "lora_dropout": 0.05},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_so_is_what_the_adapter_keeps_in_another_form(options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    counted, kept = _both({"r": 4, "target_modules": ALL, **options}, SHAPE, 60, 2, dtype, tmp_path)
    assert counted == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"use_dora": True, "target_modules": [*ALL, "embed_tokens"]}, 1.2),
        ({"use_dora": True, "lora_dropout": 0.05, "init_lora_weights": "pissa"}, 1.2),
        ({"lora_bias": True}, 1.2),
        ({"modules_to_save": ["o_proj", "lm_head"], "target_modules": ["q_proj"]}, 1.2),
        ({"type": "ia3"}, 1.25),
    ],
    ids=str,
)
def test_what_peft_itself_computes_is_not_counted_too_low(
    options: dict[str, Any], most: float, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("hyperion_adapters_ia3")
    own = {} if "type" in options else {"r": 4, "target_modules": ALL}
    counted, kept = _both({**own, **options}, SHAPE, 60, 2, dtype, tmp_path)
    assert kept <= counted <= most * kept, counted / kept


def _both(
    options: dict[str, Any], shape: tuple[int, ...], tokens: int, documents: int, dtype: str, folder: Path
) -> tuple[int, int]:
    """Bytes as counted from facts alone, and bytes that autograd keeps."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("hyperion_adapters_lora")
    from hyperion_core.live_facts import live_model_facts
    from hyperion_core.registry import registry
    from hyperion_core.testing.adapters import context
    from hyperion_core.testing.tiny import tiny_llama

    hidden, inner, layers, heads, groups = shape
    base = tiny_llama(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                      num_key_value_heads=groups, max_position_embeddings=1024)  # fmt: skip
    facts = replace(live_model_facts(base), attention_heads=heads)
    adapter: Any = registry().create("adapter", options.get("type", "lora"))
    config = adapter.config_class.parse(options)
    cost = adapter.adapter_estimate(config, facts, Workload(1, tokens, True, dtype))
    step = Step(tokens, tokens // documents, dtype)
    held = held_before(facts, cost, None, step, adapter.adapter_targets(config, facts))
    model = adapter.adapter_apply(base.to(getattr(torch, dtype)), "default", config, context(folder))
    return kept_bytes(facts, held, step), _kept(model.train(), tokens, documents)


def _kept(model: Any, tokens: int, documents: int) -> int:
    """Bytes that are there for the backward pass when the forward pass is over, weights and rows aside."""
    import torch

    from hyperion.acceleration.documents import packed
    from hyperion.acceleration.fused import fused
    from hyperion.acceleration.packing import attending_within_documents
    from hyperion.engine.loss import supervised_logprobs

    rows = [{"input_ids": [number + 1, *range(5, tokens // documents + 4)]} for number in range(documents)]
    for row in rows:
        row["input_ids"] = [each % 250 for each in row["input_ids"]]
        row["labels"] = row["input_ids"]
    batch = packed(rows)
    outside = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    outside |= {t.untyped_storage().data_ptr() for t in batch.values() if isinstance(t, torch.Tensor)}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: Any) -> _Kept:
        one = _Kept(tensor)
        kept.add(one)
        return one

    with (
        fused(model), attending_within_documents(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor),
    ):  # fmt: skip
        loss = supervised_logprobs(model, batch).logps.sum()
    assert loss.requires_grad
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in kept}
    return sum(size for pointer, size in storages.items() if pointer not in outside)


class _Kept:
    """A saved tensor, for as long as autograd holds it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
