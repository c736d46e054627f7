"""Fused layers give what the layers give, and only where they do."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hyperion.acceleration.fused import fused

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.requires_grad_(False)


def loss_and_gradient(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 32, generator=generator).to(next(model.parameters()).dtype).requires_grad_()
    out = model(inputs_embeds=x).logits.float()
    weights = torch.randn(out.shape, generator=generator)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    return out.detach(), gradient.float()


@pytest.mark.parametrize("kind, norms, mlps", [("Llama", 5, 2), ("Qwen3", 9, 2), ("Gemma", 0, 0), ("Phi3", 5, 0)])
def test_a_model_computes_the_same(kind, norms, mlps):
    """Gemma's norm adds 1 to its weight, and its MLP has a GELU; Phi 3's MLP holds gate and up in one: left alone."""
    model = model_of(kind)
    before = [loss_and_gradient(model, seed) for seed in range(3)]
    with fused(model) as counts:
        assert (counts["RMSNorm"], counts["SwiGLU"]) == (norms, mlps)
        after = [loss_and_gradient(model, seed) for seed in range(3)]
    for own, mine in zip(before, after, strict=True):
        for first, second in zip(own, mine, strict=True):
            assert (first - second).norm() <= 1e-5 * first.norm()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_bfloat16_is_no_further_from_the_truth(part):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96)
    module = (LlamaRMSNorm(64) if part == "norm" else LlamaMLP(config)).requires_grad_(False)
    x, towards = torch.randn(1, 50, 64).bfloat16(), torch.randn(1, 50, 64)
    found = {}
    for name, dtype in (("truth", torch.float32), ("own", torch.bfloat16), ("fused", torch.bfloat16)):
        module = module.bfloat16().to(dtype)  # the same weights each time
        given = x.to(dtype, copy=True).requires_grad_()
        with fused(nn.ModuleList([module] if name == "fused" else [])):
            out = module(given)
        (out * towards.to(dtype)).sum().backward()
        found[name] = (out.detach().float(), given.grad.float())
    for truth, own, mine in zip(*found.values(), strict=True):
        assert (mine - truth).norm() <= 1.2 * (own - truth).norm()


def test_the_kept_activations_are_fewer():
    """What autograd holds on to for one layer of each kind, in bytes a token."""
    model = model_of("Llama", torch.bfloat16)

    def kept(module, width):
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes if tensor.shape[:2] == (1, 10) else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.randn(1, 10, width).bfloat16().requires_grad_())
        return sum(sizes.values()) / 10

    norm, mlp = model.model.layers[0].input_layernorm, model.model.layers[0].mlp
    before = kept(norm, 32), kept(mlp, 32)
    with fused(model):
        assert kept(norm, 32) == 2 * 32 + 4 < before[0]
        assert kept(mlp, 32) == 2 * 2 * 48 < before[1]


def test_a_norm_that_trains_or_computes_something_else_is_left_alone():
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * 0.5

    model = nn.ModuleList([LlamaRMSNorm(8), HalfRMSNorm(8).requires_grad_(False)])
    with fused(model) as counts:
        assert not counts
    raised = nn.ModuleList([LlamaRMSNorm(8).requires_grad_(False)])
    with pytest.raises(ZeroDivisionError), fused(raised):
        raise ZeroDivisionError
    assert "forward" not in vars(raised[0])
