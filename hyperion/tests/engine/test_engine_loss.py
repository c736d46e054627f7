"""The chunked loss is the plain one: same numbers, same gradients, never the full logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from hyperion_core.errors import TrainingError
from torch.nn.functional import cross_entropy

from hyperion.engine.loss import check_head, output_head, supervised_logprobs

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Each with the factor or cap that its architecture puts on the logits, strong enough to be seen.
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0, tie_word_embeddings=False),
}


def model_of(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), attn_implementation="eager").eval()


def ragged_batch(seed=0, rows=3, length=11):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        end, start = length - 2 * row, row + 1
        mask[row, end:], ids[row, end:], labels[row, end:] = 0, 0, -100
        if row:  # the first row supervises even its first token, which nothing predicts
            labels[row, :start] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch):
    found = supervised_logprobs(model, batch, chunk_size=7)
    expected = plain_loss(model, batch)
    mine, plain = gradients(model, -found.logps.sum()), gradients(model, expected)
    torch.testing.assert_close(-found.logps.sum(), expected, rtol=1e-5, atol=0)
    assert mine.keys() == plain.keys()
    assert mine
    for name, gradient in plain.items():
        assert torch.norm(mine[name] - gradient) <= 1e-5 * torch.norm(gradient), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_plain_cross_entropy(name):
    model = model_of(name)
    assert_same(model, ragged_batch())
    check_head(model, ragged_batch())


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"]])  # alone: no hidden state carries gradient
def test_lora_on_the_output_head_is_part_of_the_loss(targets):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("llama"), LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert_same(model, ragged_batch())
    assert any("lm_head" in name for name, p in model.named_parameters() if p.grad is not None)


def test_sequence_and_token_tell_where_each_logprob_comes_from():
    model, batch = model_of("llama"), ragged_batch()
    found = supervised_logprobs(model, batch)
    logs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach().log_softmax(-1)
    expected = [
        (row, int(batch["labels"][row, t]), float(logs[row, t - 1, batch["labels"][row, t]]))
        for row in range(3)
        for t in range(1, 11)
        if batch["labels"][row, t] != -100
    ]
    assert found.sequence.tolist() == [row for row, _, _ in expected]
    assert found.token.tolist() == [token for _, token, _ in expected]
    torch.testing.assert_close(found.logps, torch.tensor([value for _, _, value in expected]))


def test_full_logits_never_exist():
    model, batch = model_of("llama"), ragged_batch(rows=3)
    rows_seen = []
    output_head(model).register_forward_hook(lambda m, a, logits: rows_seen.append(logits[..., 0].numel()))
    (-supervised_logprobs(model, batch, chunk_size=4).logps.sum()).backward()
    assert max(rows_seen) <= 4
    assert sum(rows_seen) > 2 * int((batch["labels"][:, 1:] != -100).sum())  # each chunk twice: forward and backward


def test_a_batch_without_supervision_gives_a_zero_that_can_be_differentiated():
    model, batch = model_of("llama"), ragged_batch()
    batch["labels"][:] = -100
    loss = -supervised_logprobs(model, batch).logps.sum()
    loss.backward()
    assert loss.item() == 0.0


def test_an_architecture_that_treats_its_logits_in_an_unknown_way_is_refused():
    class Doubling(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits * 2
            return outputs

    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="Doubling cannot be computed in chunks"):
        check_head(Doubling(ARCHITECTURES["llama"]()), ragged_batch())
