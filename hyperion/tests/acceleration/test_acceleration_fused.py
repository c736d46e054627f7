"""Fused layers give what the layers give, and only where they do."""

from __future__ import annotations

import copy

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


class Dropping(LlamaMLP):
    """Drops activations where it trains."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Clamping(LlamaMLP):
    """Computes as its parent does until the numbers are large."""

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-5, 5))


@pytest.mark.parametrize("kind", [Dropping, Clamping])
@pytest.mark.parametrize("training", [False, True])
def test_what_shows_only_in_training_or_with_large_numbers_is_seen(kind, training):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96)
    module = nn.ModuleList([kind(config)]).requires_grad_(False).train(training)
    with fused(module) as counts:
        assert not counts
    assert module[0].training == training


def test_layers_that_hold_no_parameters_are_fused_too():
    """As quantized ones do, which hold buffers."""

    class Packed(nn.Module):
        def __init__(self, out, into):
            super().__init__()
            self.in_features = into
            self.register_buffer("codes", torch.randint(-8, 8, (out, into), dtype=torch.int8))
            self.register_buffer("scale", torch.tensor(0.05))

        def forward(self, x):
            return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)

    torch.manual_seed(0)
    mlp = LlamaMLP(transformers.LlamaConfig(hidden_size=64, intermediate_size=96))
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = Packed(96, 64), Packed(96, 64), Packed(64, 96)
    x = torch.randn(1, 7, 64)
    before = mlp(x)
    with fused(nn.ModuleList([mlp])) as counts:
        assert counts == {"SwiGLU": 1}
        assert (mlp(x) - before).norm() <= 1e-5 * before.norm()


def test_a_copy_computes_with_its_own_weights():
    model = model_of("Llama")
    x = torch.tensor([[3, 4, 5]])
    before = model(x).logits
    with fused(model):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.data.zero_()
        assert not twin(x).logits.any()
        assert torch.allclose(model(x).logits, before, atol=1e-5)


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
