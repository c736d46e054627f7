"""The figures by which two models are compared, and what is let through."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import ArtifactError, DataError, ModelError
from hyperion_core.testing.tiny import tiny_llama, tiny_tokenizer

from hyperion.quantization.parity import (
    DEFAULT_TEXTS,
    FORMAT_TOLERANCE,
    ParityTolerance,
    Reference,
    compare_models,
    logits_of,
    loosest,
    parity,
    quantized_tolerance,
)
from hyperion.quantization.parity_texts import read_texts

LOOSE = ParityTolerance(mean_kl=math.inf, top1=0.0)


def random(seed: int, tokens: int = 7, vocabulary: int = 11) -> torch.Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def reference(*logits: torch.Tensor, **changes: Any) -> Reference:
    ids = tuple(tuple(range(index, index + len(each))) for index, each in enumerate(logits))
    return Reference(logits, ids, **{"tokenized": {"a": (1,)}, "vocabulary": "v", **changes})


def test_the_figures_are_those_of_the_textbook() -> None:
    before, after = (random(1), random(2, tokens=3)), (random(3), random(4, tokens=3))
    found = parity(reference(*before), reference(*after))
    p, q = (torch.cat(each).double().log_softmax(-1) for each in (before, after))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found.positions == 10 and found.texts == 2
    assert found.mean_kl == pytest.approx(kl.mean().item()) and found.max_kl == pytest.approx(kl.max().item())
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.max_logit == pytest.approx((torch.cat(before) - torch.cat(after)).abs().max().item())


def test_tokens_without_a_chance_count_for_nothing_and_no_numbers_never_pass() -> None:
    one, other = random(1), random(1)
    one[:, 4] = other[:, 4] = -math.inf
    assert parity(reference(one), reference(other)).mean_kl == 0
    for value in (math.nan, math.inf, -math.inf):
        broken = random(1)
        broken[2, 3] = value
        found = parity(reference(random(1)), reference(broken))
        assert found.as_data()["max_kl"] is None or value == -math.inf
        with pytest.raises(ArtifactError, match="does not answer"):
            found.check(FORMAT_TOLERANCE["bfloat16"], "it")
    broken[2, 3] = math.nan
    with pytest.raises(ModelError, match="no numbers"):
        parity(reference(broken), reference(random(1)))
    with pytest.raises(ArtifactError, match="11 tokens, the other for 12"):
        parity(reference(random(1)), reference(random(1, vocabulary=12)))


def test_another_tokenizer_never_passes() -> None:
    logits = random(1)
    for changes in ({"tokenized": {"a": (2,)}}, {"tokenized": {"b": (1,)}}, {"vocabulary": "w"}):
        with pytest.raises(ArtifactError, match="another tokenizer"):
            parity(reference(logits), reference(logits, **changes)).check(LOOSE, "it")


def test_many_and_long_texts_are_cut_alike() -> None:
    model, tokenizer = tiny_llama(max_position_embeddings=64), tiny_tokenizer()
    kept = logits_of(model, tokenizer, ["long " * 200, *(f"text {n}" for n in range(500))])
    assert sum(map(len, kept.ids)) <= 2048 and len(kept.ids) == 501 and max(map(len, kept.ids)) == 4
    assert len(kept.tokenized["long " * 200]) == 1000, "token ids are compared whole"
    assert len(logits_of(model, tokenizer, ["long " * 200]).ids[0]) == 64, "no longer than the model reads"
    with pytest.raises(DataError, match="nothing to compare"):
        logits_of(model, tokenizer, ["", ""])


def test_one_model_at_a_time_is_in_memory() -> None:
    alive: list[Any] = []

    def load() -> tuple[Any, Any]:
        gc.collect()
        assert not any(model() for model in alive), "the first model is still there"
        model = tiny_llama(seed=len(alive)).train()
        alive.append(weakref.ref(model))
        return model, tiny_tokenizer()

    found = compare_models(load, load, DEFAULT_TEXTS[:2])
    assert found.mean_kl > 0 and not found.retokenized


def test_tolerances_are_the_users_to_set() -> None:
    usual = quantized_tolerance(4)
    assert usual.changed(None, None) == usual and usual.changed(None, 0.2).mean_kl == usual.mean_kl
    assert usual.changed(7.0, None).most(effect=1e-9) == 7.0, "what a user says stands alone"
    assert usual.most(effect=0.1) == pytest.approx(0.075)
    assert loosest(FORMAT_TOLERANCE["float16"], FORMAT_TOLERANCE["bfloat16"]) == FORMAT_TOLERANCE["bfloat16"]
    for limits in ((-1.0, None), (None, 1.5), (math.nan, None)):
        with pytest.raises(DataError, match="cannot be the limit"):
            usual.changed(*limits)


def test_prompts_are_read_from_lines_and_from_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two  \n")
    (tmp_path / "b.jsonl").write_text('"one"\n{"text": "two"}\n{"prompt": "three", "completion": " four"}\n')
    assert read_texts(tmp_path / "a.txt") == ["one", "  two  "]
    assert read_texts(tmp_path / "b.jsonl") == ["one", "two", "three four"]
    for content, says in (("", "no prompts"), ('{"prompt": 3}', "b.jsonl:1 has no prompt"), ("{", "no JSON")):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(DataError, match=says):
            read_texts(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")
