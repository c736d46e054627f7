"""The faster LoRA layer is PEFT's layer: same outputs and gradients, and PEFT's own code where there is more to do."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperion_peft.fast_linear import FastLoraLayer, speed_up


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def model_of(dtype=torch.float32, adapters=("default",), **changes):
    torch.manual_seed(0)
    configs = [
        LoraConfig(r=4 + number, lora_alpha=6, target_modules=["first", "second"], **changes)
        for number in range(len(adapters))
    ]
    model = get_peft_model(Two().to(dtype), configs[0], adapter_name=adapters[0])
    for name, config in zip(adapters[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.base_model.set_adapter(list(adapters))
    return model


def outcome(model, dtype=torch.float32, seed=1, run=None):
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 24).bfloat16().to(dtype).requires_grad_()
    out = (run or model)(x)
    (out.float() * torch.randn(out.shape)).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def assert_same(mine, own, allowed):
    assert mine.keys() == own.keys()
    for name, expected in own.items():
        assert mine[name].dtype == expected.dtype, name
        assert (mine[name].double() - expected.double()).norm() <= allowed * expected.double().norm(), name


@pytest.mark.parametrize("adapters", [("default",), ("default", "other", "third")])
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_outputs_and_gradients_are_those_of_peft(dtype, allowed, adapters):
    model = model_of(dtype, adapters)
    if dtype == torch.float64:
        model = model.double()
    own = outcome(model, dtype)
    speed_up(model)
    assert sum(isinstance(module, FastLoraLayer) for module in model.modules()) == 2
    assert_same(outcome(model, dtype), own, allowed)
    model.requires_grad_(False)  # frozen adapters, as of a reference
    assert outcome(model, dtype).keys() == {"out", "x"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bfloat16_is_no_further_from_the_truth_than_peft_under_autocast(dropout):
    """Both round the gradients of A and B to bfloat16 before they are summed up in float32. One draw of ten tokens says
    little, so that the errors of several are taken together."""
    exact = model_of(torch.bfloat16, lora_dropout=dropout).double()
    plain = model_of(torch.bfloat16, lora_dropout=dropout)
    fast = model_of(torch.bfloat16, lora_dropout=dropout)
    speed_up(fast)
    mine, own = defaultdict(float), defaultdict(float)
    for seed in range(8):
        truth = outcome(exact, torch.float64, seed)
        with torch.autocast("cpu", torch.bfloat16):
            found = {"own": outcome(plain, torch.bfloat16, seed), "mine": outcome(fast, torch.bfloat16, seed)}
        for name, value in truth.items():
            own[name] += (found["own"][name].double() - value).square().sum().item()
            mine[name] += (found["mine"][name].double() - value).square().sum().item()
    assert len(mine) == 2 + 4
    assert all(mine[name] <= 1.1**2 * own[name] for name in mine), (mine, own)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_dropout_drops_what_peft_drops(dtype, allowed, seed):
    """As many numbers are drawn, too: those that weigh the outputs come after them."""
    model = model_of(lora_dropout=0.3).to(dtype)
    own = outcome(model, dtype, seed)
    without = outcome(model.eval(), dtype, seed)
    speed_up(model)
    assert_same(outcome(model, dtype, seed), without, allowed)
    assert_same(outcome(model.train(), dtype, seed), own, allowed)
    assert (own["out"] - without["out"]).norm() > 0.1 * own["out"].norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(reentrant):
    model = model_of(torch.bfloat16, lora_dropout=0.3)
    speed_up(model)
    again = outcome(model, torch.bfloat16, run=lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_same(again, outcome(model, torch.bfloat16), 0.0)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.set_adapter([]),
        lambda model: model.eval(),
    ],
    ids=["disabled", "merged", "none active", "evaluation"],
)
def test_states_of_a_layer(prepare):
    model = model_of()
    prepare(model)
    own = outcome(model)
    speed_up(model)
    assert_same(outcome(model), own, 1e-5)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5, "adapters": ("default", "other")}, {"use_dora": True}, {"lora_bias": True}]
)
def test_what_is_more_than_plain_lora_is_left_to_peft(changes):
    model = model_of(**changes)
    torch.manual_seed(3)
    own = outcome(model)
    speed_up(model)
    torch.manual_seed(3)
    mine = outcome(model)
    assert mine.keys() == own.keys()
    assert all(torch.equal(mine[name], own[name]) for name in own)


def test_autocast_over_a_float32_base():
    model = model_of()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(outcome(model))
        speed_up(model)
    assert_same(found[1], found[0], 1e-2)


def test_a_copy_stands_alone_and_unloading_gives_the_plain_layers_back():
    model = model_of()
    speed_up(model)
    twin = copy.deepcopy(model)
    before = outcome(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert_same(outcome(model), before, 0.0)
    base = model.unload()
    assert type(base.first) is type(base.second) is nn.Linear


def test_a_model_can_be_pickled():
    model = model_of()
    speed_up(model)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(outcome(twin), outcome(model), 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_copy_of_the_input_is_kept(dropout):
    def kept(model):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(1, 4000, 24).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model.model.first(x)
        return sum(sizes.values()) / 4000

    model = model_of(torch.bfloat16, lora_dropout=dropout)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    own = kept(model)
    speed_up(model)
    assert isinstance(model.base_model.model.first, Linear)
    mask = 24 if dropout else 0
    assert kept(model) < 2 * (24 + 4) + mask + 5 < own  # the input, and r numbers
