"""A packed step is the padded step: same loss, same gradients, and no document sees another."""

from __future__ import annotations

import copy
import logging
import re
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from hyperion_core.errors import TrainingError
from torch import nn

from hyperion.acceleration import offloading
from hyperion.acceleration.attention import NAME
from hyperion.acceleration.documents import packed
from hyperion.acceleration.fused import fused
from hyperion.acceleration.packing import attending_within_documents, drops, why_not_packed
from hyperion.data.collate import Collator
from hyperion.engine.loss import supervised_logprobs

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 5},  # and rows of up to 14 tokens
    "Gemma3Text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"sliding_window": 5},
    "Gemma": {},
    "Granite": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": {},
    "Olmo2": {},
}


def model_of(name, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **ARCHITECTURES.get(name, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def gradients(model, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = -supervised_logprobs(model, batch).logps.sum()
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_a_beginning(rows):
    """The same 20 tokens before each row, and nothing of them, nor the token after them, learnt."""
    return [
        {"input_ids": [*range(3, 23), *row["input_ids"]], "labels": [-100] * 21 + row["labels"][1:]} for row in rows
    ]


def dynamic_positions(reach):
    return {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": reach}


def of_rows(rows):
    return Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("alike", [False, True])
def test_packed_gradients_are_the_padded_ones(tiny, name, seed, alike):
    model, rows = model_of(name), list(tiny.rows(9, seed=seed))
    rows = with_a_beginning(rows) if alike else rows
    assert packed(rows)["documents"].shared == (20 if alike else 0)
    assert why_not_packed(model, rows, max(len(row["input_ids"]) for row in rows)) == ""
    loss, expected = gradients(model, [Collator(0)(rows)])
    with attending_within_documents(model), fused(model):
        mine_loss, mine = gradients(model, [packed(rows[:4]), packed(rows[4:])])
    assert mine_loss == pytest.approx(loss, rel=1e-5)
    assert mine.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.norm(mine[key] - gradient) <= 1e-5 * torch.norm(gradient) + 5e-6, key  # OPT's key bias has none
    assert model.config._attn_implementation == "eager"


def test_gradients_accumulate_in_place(tiny):
    model, rows = model_of("Llama"), list(tiny.rows(4))
    places = []
    with attending_within_documents(model), fused(model):
        for part in (rows[:2], rows[2:]):
            supervised_logprobs(model, packed(part)).logps.sum().backward()
            places.append({name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None})
    assert places[0] == places[1] and len(places[0]) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 20])
def test_no_bit_and_no_gradient_crosses_from_one_document_to_another(tiny, dtype, shared):
    model = model_of("Llama", dtype)
    rows = list(tiny.rows(2, shortest=9))
    first, second = with_a_beginning(rows) if shared else rows
    own = first["input_ids"][shared:]
    changed = {**first, "input_ids": first["input_ids"][:shared] + [2 + (token + 5) % 60 for token in own]}
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: seen.append(out.detach().requires_grad_()) or seen[-1]
    )
    found = []
    with attending_within_documents(model):
        for before in (first, changed):
            scores = supervised_logprobs(model, packed([before, second]))
            own = scores.logps[scores.sequence == 1]
            (gradient,) = torch.autograd.grad(own.sum(), seen[-1])
            length = len(before["input_ids"])
            assert not gradient[0, shared:length].any()
            assert gradient[0, :shared].any() == bool(shared)  # what both begin with is the second's, too
            found.append((own.detach(), gradient[0, length:]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.any()


class Leaky(transformers.LlamaForCausalLM):
    """Each position takes something of the one before it, as a convolution would."""

    def forward(self, input_ids=None, **inputs):
        x = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=x + x.roll(1, dims=1).mul(0.1), **inputs)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Leaky(transformers.LlamaConfig(**SIZES)).eval(), "sees the tokens of another"),
        (lambda: model_of("Gemma2", attn_logit_softcapping=5.0), "softcap"),
        (lambda: model_of("Mamba", state_size=4), "sees the tokens of another"),
        (lambda: model_of("Bloom", n_head=4), "documents|alone|another"),
    ],
    ids=["leaky", "softcap", "mamba", "alibi"],
)
def test_a_model_that_cannot_be_packed_is_found_out(tiny, make, said):
    why = why_not_packed(make(), list(tiny.rows(2, shortest=9)))
    assert re.search(said, why), why


@pytest.mark.parametrize(
    "made, reach",
    [
        ({"name": "Phimoe", "num_local_experts": 2, "sliding_window": 70}, 70),
        ({"name": "Llama", "attention_chunk_size": 50}, 50),
        ({"name": "Llama", "rope_parameters": dynamic_positions(40)}, 40),
    ],
    ids=["a window in the mask alone", "chunks", "dynamic positions"],
)
def test_rows_beyond_what_a_few_tokens_show_are_padded(tiny, made, reach):
    """The probe is short: what changes only in longer rows is read from the config, or tried with a narrow window."""
    model, rows = model_of(**made), list(tiny.rows(2, shortest=9))
    assert why_not_packed(model, rows, reach) == ""
    assert str(reach) in why_not_packed(model, rows, reach + 1)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3Text", "Phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_far_longer_than_the_probe_is_found_to_work_in_a_pack(tiny, name, dtype):
    model, rows = model_of(name, dtype, sliding_window=2048), list(tiny.rows(2))
    assert why_not_packed(model, rows, 5000) == ""
    kept = [vars(module)["sliding_window"] for module in model.modules() if vars(module).get("sliding_window")]
    assert {model.config.sliding_window, *kept} == {2048}


def test_a_window_that_comes_from_elsewhere_is_not_trusted(tiny):
    """Where a narrow window in the config changes nothing, the pack that equals the row alone has shown nothing."""
    model = model_of("Mistral", sliding_window=None)
    model.config.sliding_window = 2048
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(model.config)
        layer.self_attn.config.sliding_window = None
    model.model.config = model.model.layers[0].self_attn.config
    assert "window of 2048" in why_not_packed(model, list(tiny.rows(2)), 2049)


@pytest.mark.parametrize("longest", [20, 30])
def test_evaluation_rows_are_looked_at_too(tiny, tmp_path, longest):
    """Training rows within reach of the model's positions say nothing of longer ones in the evaluation."""
    evaluation = tiny.rows(4, seed=5, shortest=longest, longest=longest)
    found = {}
    for packing in (True, False):
        (tmp_path / str(packing)).mkdir()
        run = tiny.Run(tmp_path / str(packing), evaluation=evaluation, save_strategy="no", max_steps=1)
        torch.manual_seed(1)
        model = run.adapter.adapter_apply(
            model=tiny.llama(rope_parameters=dynamic_positions(20)), name="default", config=run.config, ctx=run.ctx
        )
        run.arguments["eval_strategy"] = "epoch"
        if packing and longest > 20:
            with pytest.raises(TrainingError, match=r"(?s)cannot be packed.*30 tokens, and beyond 20"):
                run.fit(model=model, packing=True)
        else:
            found[packing] = run.fit(model=model, packing=packing).metrics["eval_loss"]
    assert len(found) == 1 or found[True] == pytest.approx(found[False], rel=1e-5)


def test_memory_that_runs_out_in_the_trial_is_no_reason_to_pad(tiny, tmp_path):
    """Padding would want more of it."""
    run = tiny.Run(tmp_path, save_strategy="no", max_steps=1)
    model = run.model()

    def want_too_much(module, arguments):
        if model.config._attn_implementation == NAME and not module.training:
            torch.empty(1 << 52)

    model.model.layers[1].mlp.register_forward_pre_hook(want_too_much)
    with pytest.raises(TrainingError, match="cpu ran out of memory"):
        run.fit(model=model)


def test_what_drops_at_random_is_known():
    model = model_of("Llama")
    assert not drops(model)
    model.config.attention_dropout = 0.1
    assert drops(model)
    assert drops(torch.nn.Sequential(torch.nn.Dropout(0.1)))


def test_noise_that_is_scaled_by_a_rows_length_pads(tiny, tmp_path):
    """NEFTune takes the whole pack for one row: packed, its noise would be smaller."""
    found = {}
    for name, speed in {"left to choose": {}, "padded": {"packing": False}}.items():
        (tmp_path / name).mkdir()
        run = tiny.Run(tmp_path / name, save_strategy="no", num_train_epochs=1, neftune_noise_alpha=5.0)
        found[name] = run.trained(run.fit(**speed).model)
    for key, weight in found["padded"].items():
        assert torch.equal(found["left to choose"][key], weight), key


def test_virtual_tokens_of_an_adapter_are_found_out(tiny):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(model_of("Llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert why_not_packed(model, list(tiny.rows(2, shortest=9)))


@pytest.mark.parametrize("accumulate, alike", [(1, False), (3, False), (3, True)])
def test_a_run_learns_the_same_packed_or_padded(tiny, tmp_path, accumulate, alike):
    """Whole trajectories: the same rows in every step, whatever packs they are in."""
    train, evaluation = tiny.rows(22), tiny.rows(7, seed=5)
    if alike:
        train, evaluation = (of_rows(with_a_beginning(list(rows))) for rows in (train, evaluation))
    found = {}
    for name, speed in {
        "padded": {"packing": False, "fused_layers": False},
        "packed": {"packing": True, "pack_length": 20},
        "one by one": {"pack_length": 1},
    }.items():
        once = {"save_strategy": "no", "num_train_epochs": 1}
        run = tiny.Run(tmp_path / name, train=train, gradient_accumulation_steps=accumulate, **once)
        run.arguments["eval_strategy"] = "epoch"
        run.evaluation = evaluation
        (tmp_path / name).mkdir()
        result = run.fit(**speed)
        tokens = [line["tokens"] for line in run.lines() if "tokens" in line]
        found[name] = run.trained(result.model), tokens, result.metrics["train_loss"], result.metrics["eval_loss"]
    weights, tokens, *losses = found.pop("padded")
    for others, other_tokens, *other_losses in found.values():
        assert other_tokens == tokens
        assert other_losses == pytest.approx(losses, rel=1e-4)
        for key, weight in weights.items():
            assert torch.norm(others[key] - weight) <= 1e-3 * torch.norm(weight), key


def test_activations_that_are_computed_again_are_computed_within_documents(tiny, tmp_path):
    found = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        run = tiny.Run(folder, gradient_checkpointing=checkpointing, save_strategy="no", num_train_epochs=1)
        found.append(run.trained(run.fit(packing=True).model))
    for key, weight in found[0].items():
        assert torch.norm(found[1][key] - weight) <= 1e-4 * torch.norm(weight), key


@pytest.mark.skipif(sys.platform == "win32", reason="not on Windows")
def test_a_run_whose_activations_wait_on_disk_learns_the_same_to_the_bit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "_LEAST", 256)
    found = []
    for place in (None, "disk"):
        folder = tmp_path / str(place)
        folder.mkdir()
        run = tiny.Run(folder, save_strategy="no", num_train_epochs=1)
        found.append(run.trained(run.fit(offload_activations=place).model))
        assert not list(folder.rglob(".activations*"))
    assert all(torch.equal(found[1][key], weight) for key, weight in found[0].items())


def test_packing_that_is_asked_for_and_cannot_be_is_refused_else_told(tiny, tmp_path, caplog):
    run = tiny.Run(tmp_path, save_strategy="no", max_steps=1)
    torch.manual_seed(1)
    make = lambda: run.adapter.adapter_apply(  # noqa: E731
        model=Leaky(tiny.llama().config), name="default", config=run.config, ctx=run.ctx
    )
    with pytest.raises(TrainingError, match="cannot be packed for Leaky"):
        run.fit(model=make(), packing=True)
    with caplog.at_level(logging.WARNING):
        run.fit(model=make())
    assert "rows are padded, not packed" in caplog.text
    assert NAME not in str(vars(run.model().config))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_as_many_layers_are_computed_again_as_were_asked_for(tiny, tmp_path, count):
    run = tiny.Run(
        tmp_path, save_strategy="no", max_steps=1, gradient_accumulation_steps=1, gradient_checkpointing=True
    )
    model = run.model()
    calls = [0, 0]
    for number, layer in enumerate(model.model.layers):
        up = layer.mlp.up_proj

        def counted(module, arguments, number=number):
            calls[number] += module.training and torch.is_grad_enabled()

        up.register_forward_pre_hook(counted)
    run.fit(model=model, recompute_layers=count, fused_layers=False)  # whose trial would be counted
    assert calls == [2 if number < count else 1 for number in range(2)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_ends_at_the_lowest_layer_that_learns(tiny, tmp_path, monkeypatch, checkpointing):
    every = tiny.LowRank.modules
    upper = lambda self, model: {n: m for n, m in every(self, model).items() if "layers.1." in n}  # noqa: E731
    monkeypatch.setattr(tiny.LowRank, "modules", upper)
    run = tiny.Run(tmp_path, save_strategy="no", max_steps=1, gradient_checkpointing=checkpointing)
    model = run.model()
    passed = set()
    for number, layer in enumerate(model.model.layers):

        def note(module, *_, number=number):  # the probe before the first step goes down to the embeddings
            passed.update({number} if module.training else ())

        layer.mlp.register_full_backward_hook(note)
    run.fit(model=model, fused_layers=False)  # whose trial would be seen
    assert passed == {1}
