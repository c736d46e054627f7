"""The chunked loss is the plain one: same numbers, same gradients, never the full logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from hyperion_core.errors import TrainingError
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from hyperion.engine.loss import Postprocessing, _scores, check_head, supervised_logprobs

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
STATE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
EXPERTS = {
    "vocab_size": 56, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
}  # fmt: skip
# Each with the factor or cap that its architecture puts on the logits, strong enough to be seen.
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0, tie_word_embeddings=False),
    "hyperclovax": lambda: transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=0.25),
    "minicpm3": lambda: transformers.MiniCPM3Config(**{**SIZES, **LATENT}, dim_model_base=8),
    "falcon_h1": lambda: transformers.FalconH1Config(**SIZES, **STATE, lm_head_multiplier=0.25),
    "inkling": lambda: transformers.InklingTextConfig(**{**SIZES, **EXPERTS}, unpadded_vocab_size=50),
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


@pytest.mark.parametrize("trains", [False, True])
def test_full_logits_never_exist(trains):
    """Neither where the head is frozen, and its gradient computed in the forward pass, nor where it trains."""
    model, batch = model_of("llama"), ragged_batch(rows=3)
    model.lm_head.requires_grad_(trains)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-1] == SIZES["vocab_size"]:
                sizes.append(out.untyped_storage().nbytes() // 4 // SIZES["vocab_size"])
            return out

    with Sizes():
        (-supervised_logprobs(model, batch, chunk_size=4).logps.sum()).backward()
    assert max(sizes) in (4, SIZES["hidden_size"])  # a chunk's logits; and the head's weight, transposed


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("frozen", [True, False])
def test_other_scores_of_the_logits_and_their_gradients(name, frozen):
    """What label smoothing and z-loss are made of, whether the head is frozen or not."""
    model, batch = model_of(name), ragged_batch()
    model.get_output_embeddings().requires_grad_(not frozen)
    found = supervised_logprobs(model, batch, chunk_size=7)
    smoothed, z = found.scores.mean_logit() - found.scores.logsumexp, found.scores.logsumexp.square().sum()
    mine = gradients(model, -(0.9 * found.logps + 0.1 * smoothed).sum() + 0.01 * z)

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    chosen = batch["labels"][:, 1:] != -100
    smooth = cross_entropy(logits[:, :-1][chosen], batch["labels"][:, 1:][chosen], reduction="sum", label_smoothing=0.1)
    expected = gradients(model, smooth + 0.01 * logits[:, :-1][chosen].logsumexp(-1).square().sum())
    assert mine.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.norm(mine[key] - gradient) <= 1e-5 * torch.norm(gradient), key


def test_a_frozen_bfloat16_head_is_as_exact_as_autograd_where_the_model_is_sure():
    """p - 1 of a token that the model is sure of is small: rounding p and 1 apart would leave noise in its place."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 50, bias=False).bfloat16().requires_grad_(False)
    token = torch.arange(40)
    states = (head.weight[token].float() * 120).bfloat16()
    results = {}
    for way in ("mine", "bfloat16", "float32"):
        dtype = torch.float32 if way == "float32" else torch.bfloat16
        given = states.to(dtype, copy=True).requires_grad_()
        if way == "mine":
            logps = _scores(head, Postprocessing(), given, token, 16)[0]
        else:
            logps = (given @ head.weight.to(dtype).T).float().log_softmax(1).gather(1, token[:, None])
        logps.sum().backward()
        results[way] = given.grad.float()
    assert float(logps.exp().mean()) > 0.95
    own, mine = (float((results[way] - results["float32"]).norm()) for way in ("bfloat16", "mine"))
    assert mine <= 1.2 * own


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
