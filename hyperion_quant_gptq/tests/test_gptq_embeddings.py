"""Packed embeddings and output head: what is held, what comes out, what trains above them, what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.live_facts import live_model_facts
from hyperion_core.testing import QuantizerConformance
from hyperion_core.testing.quantizer_trial import Trial
from hyperion_core.testing.tiny import tiny_llama
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hyperion_quant_gptq import GptqConfig, GptqQuantizer
from hyperion_quant_gptq.packed_embedding import PackedEmbedding, PackedHead

_spec = importlib.util.spec_from_file_location("gptq_numbers", Path(__file__).with_name("test_gptq_numbers.py"))
assert _spec and _spec.loader
numbers: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(numbers)

PLAN = BitPlan(4, 32)
IDS = torch.arange(40).view(2, 20)


@pytest.mark.slow
class TestGptqWithPackedEmbeddings(QuantizerConformance):
    plugin = "gptq"
    options = {"embedding_bits": 4}  # noqa: RUF012

    def test_what_is_not_quantized_stays_as_it_is(self, trial: Trial) -> None:
        """All but embedding and head, which this option is for."""
        model = trial.load()
        quantized = ("model.embed_tokens.", "lm_head.", *(f"{name}." for name in trial.infos(model)))
        found = dict(model.named_parameters())
        left = {name: each for name, each in trial.base.named_parameters() if not name.startswith(quantized)}
        assert left and all(torch.equal(found[name], each) for name, each in left.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_and_memory_hold_what_is_planned(bits: int, tied: bool, tmp_path: Path) -> None:
    """Once where embedding and head share a weight; the logits are those of the dequantized tables."""
    base = numbers.save_base(tmp_path / "base", tie_word_embeddings=tied)
    folder = numbers.quantized(base, tmp_path / "made", PLAN, embedding_bits=bits)
    model = numbers.loaded(folder, PLAN, embedding_bits=bits)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tables = sorted(name for name in tensors if name.endswith("table.packed"))
    assert tables == ["lm_head.table.packed", "model.embed_tokens.table.packed"][tied:]
    assert tensors[tables[-1]].shape == (plain.vocab_size, 64 * bits // 8)

    config = GptqConfig(bits=4, group_size=32, embedding_bits=bits)
    said = GptqQuantizer().quantizer_estimate(config, live_model_facts(plain), PLAN, "float32")
    assert said.disk == sum(tensor.nbytes for tensor in tensors.values())

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedHead)
    assert (head.held is embedding.table) == tied
    for module, was in ((embedding, plain.model.embed_tokens.weight), (head, plain.lm_head.weight)):
        steps = 2 * was.unflatten(1, (-1, embedding.table.group_size)).abs().amax(-1) / (2**bits - 1)
        far = (module.weight - was).abs().unflatten(1, (-1, embedding.table.group_size)).amax(-1)
        assert (far <= (4 if module is head or tied else 0.6) * steps).all()  # GPTQ moves weights by more than a step
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        torch.testing.assert_close(model(IDS).logits, hidden @ head.weight.T)
    assert torch.equal(embedding(IDS), embedding.weight[IDS])
    assert model.to(torch.bfloat16).get_input_embeddings()(IDS).dtype == torch.bfloat16


def test_the_head_is_rounded_by_what_flows_into_it(tmp_path: Path) -> None:
    """Its outputs are nearer than those of the nearest weights."""
    from hyperion_quant_gptq.rounding import restored, rounded

    base = numbers.save_base(tmp_path / "base", tie_word_embeddings=True)
    folder = numbers.quantized(base, tmp_path / "made", BitPlan(8, 32), embedding_bits=4)
    model = numbers.loaded(folder, BitPlan(8, 32), embedding_bits=4)
    head = model.get_output_embeddings()
    was = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).lm_head.weight.detach()
    nearest = restored(rounded(was, 4, head.held.group_size, sym=True), ordered=True).float()
    with torch.no_grad():
        hidden = torch.cat([model.model(row["input_ids"]).last_hidden_state[0] for row in numbers.rows()])
        by_gptq, by_nearest = ((hidden @ (each - was).T).norm().item() for each in (head.weight, nearest))
    assert by_gptq < 0.8 * by_nearest


def test_a_checkpoint_says_that_hyperion_alone_loads_it(tmp_path: Path) -> None:
    """Plain transformers would fill the tables at random, and only warn; it refuses a format that it does not know."""
    base = numbers.save_base(tmp_path / "base", tie_word_embeddings=True)
    folder = numbers.quantized(base, tmp_path / "made", PLAN, embedding_bits=4)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert saved["quant_method"] == "hyperion_gptq" and saved["embedding_bits"] == 4
    options, _ = GptqQuantizer().quantizer_recognize(saved, ModelFacts("base"))
    assert options["embedding_bits"] == 4
    without = numbers.quantized(base, tmp_path / "without", PLAN)
    saved = json.loads((without / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert saved["quant_method"] == "gptq" and "embedding_bits" not in saved
    for given, bits in ((folder, None), (folder, 8), (without, 4)):
        with pytest.raises(CompatibilityError, match="otherwise than planned"):
            numbers.loaded(given, PLAN, embedding_bits=bits)


def test_gradients_go_through_the_head(tmp_path: Path) -> None:
    base = numbers.save_base(tmp_path / "base", tie_word_embeddings=True)
    folder = numbers.quantized(base, tmp_path / "made", PLAN, embedding_bits=4)
    head = numbers.loaded(folder, PLAN, embedding_bits=4).get_output_embeddings()
    x, above = torch.randn(3, 64, requires_grad=True), torch.randn(3, head.out_features)
    head(x).backward(above)
    torch.testing.assert_close(x.grad, above @ head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_over_a_packed_head_is_that_of_its_weight(tied: bool, tmp_path: Path) -> None:
    """Chunk by chunk, value and gradient; and nothing unpacks the head but its own products."""
    from hyperion.engine.loss import supervised_logprobs

    base = numbers.save_base(tmp_path / "base", tie_word_embeddings=tied)
    model = numbers.loaded(numbers.quantized(base, tmp_path / "made", PLAN, embedding_bits=4), PLAN, embedding_bits=4)
    head_weight = model.get_output_embeddings().weight
    labels = IDS.masked_fill(IDS % 3 == 0, -100)
    found = []
    for mine in (True, False):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        if mine:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PackedHead, "weight", property(lambda head: pytest.fail("it was unpacked")))
                loss = -supervised_logprobs(model, {"inputs_embeds": x, "labels": labels}, chunk_size=7).logps.sum()
                loss.backward()
        else:
            logits = model.model(inputs_embeds=x).last_hidden_state @ head_weight.T
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            loss.backward()
        found.append((loss.detach(), x.grad))
    for ours, plain in zip(*found, strict=True):
        assert plain.norm() > 0
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


def test_an_embedding_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gemma's scales its rows: packed, it would not. It is told before anything is rounded."""

    class Scaled(nn.Embedding):
        pass

    def load(*args: Any) -> Any:
        model = tiny_llama(hidden_size=64)
        model.model.embed_tokens.__class__ = Scaled
        return model

    monkeypatch.setattr("hyperion_quant_gptq.offline._loaded", load)
    monkeypatch.setattr("hyperion_quant_gptq.offline.quantize", lambda *args: pytest.fail("it was quantized"))
    with pytest.raises(CompatibilityError, match="Scaled"):
        numbers.quantized(numbers.save_base(tmp_path / "base"), tmp_path / "made", PLAN, embedding_bits=4)


def test_a_width_without_groups_is_refused_while_planning() -> None:
    facts = live_model_facts(tiny_llama(hidden_size=24, num_attention_heads=2, num_key_value_heads=1))
    config, plan = GptqConfig(bits=4, embedding_bits=4), BitPlan(4, 0)
    (problem,) = GptqQuantizer().quantizer_check(config, facts, plan, "cpu")
    assert problem.path == "embedding_bits" and "24 wide" in problem.what
