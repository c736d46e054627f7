"""What the suite of quantizers asks of quantized modules: their weights, what trains above them, what is put into them.

Each function takes a model that `Trial.load` gave, and fails with a sentence about its first module that is at fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..facts import BitPlan
from .bits import digest, equal
from .low_rank_delta import LowRankDelta
from .quantizer_trial import Trial, loss
from .resident import resident_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

STEPS = 5
COARSE = 2**-6  # greatest difference in bfloat16, relative to the largest value
PROBE = 16  # large, so that what a coarse type rounds is the weight and not the bias beside it
BIAS_NEAR = 1e-3  # greatest difference of a bias; those of the base are about 0.1


def offset(module: Any) -> Tensor:
    """What a linear module adds to a product, (out,): asked of what it gives, wherever it keeps it."""
    import torch

    x = torch.ones(1, 1, module.in_features, device=next(iter(resident_tensors(module).values())).device)
    with torch.no_grad():
        return cast("Tensor", (module(x) + module(-x))[0, 0] / 2).float().cpu()


def assert_used(trial: Trial, model: Module, what: str, tolerance: float) -> None:
    """`quantizer_dequantize` gives the numbers that inputs are multiplied with, in the model's own type."""
    dtype = cast(Any, model).get_input_embeddings().weight.dtype
    for name in trial.infos(model):
        module: Any = model.get_submodule(name)
        weight = trial.weight(module, name)
        bias = 0 if getattr(module, "bias", None) is None else module.bias.float()
        far = _apart_from_forward(module, weight, bias, dtype)
        assert far <= tolerance, f"quantizer_dequantize of {name} ({what}) is not what forward uses: {far:.1e} apart"


def assert_trains(model: Module, trial: Trial, what: str, learning_rate: float) -> None:
    """Five steps of Adam on a low-rank delta lower the loss, and no tensor of the base trains or changes."""
    import torch

    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not training, f"after quantizer_after_load(training=True) these of the base train: {training[:5]}"
    before = {name: digest(tensor) for name, tensor in resident_tensors(model).items()}
    delta = LowRankDelta(model, trial.infos(model))
    optimizer = torch.optim.Adam(delta.parameters, lr=learning_rate)
    first = loss(model.train()).item()
    for _ in range(STEPS):
        loss(model).backward()
        idle = sum(parameter.grad is None for parameter in delta.parameters)
        assert not idle, f"no gradient reaches {idle} of {len(delta.parameters)} tensors that train on top"
        optimizer.step()
        optimizer.zero_grad()
    last = loss(model).item()
    delta.remove()
    after = {name: digest(tensor) for name, tensor in resident_tensors(model).items()}
    changed = [name for name, held in before.items() if after.get(name) != held]
    assert not changed, f"training on top changes these tensors of the base: {changed[:5]}"
    assert last < first, f"over {what} {STEPS} steps do not lower the loss: {first:.6f} before, {last:.6f} after"


def assert_true_gradients(model: Module, trial: Trial, tolerance: float) -> None:
    """What comes through a module backwards was multiplied with its weight."""
    import torch

    for name in trial.infos(model):
        module: Any = model.get_submodule(name)
        weight = trial.weight(module, name)
        generator = torch.Generator().manual_seed(0)
        x, above = (torch.randn(2, 3, n, generator=generator).to(weight.device) for n in reversed(weight.shape))
        x.requires_grad_(True)
        y = module(x)
        assert y.requires_grad, f"no gradient goes through {name}"
        y.backward(above)
        expected = above @ weight
        assert x.grad is not None, f"no gradient comes back through {name}"
        far = ((x.grad - expected).abs().max() / expected.abs().max()).item()
        assert far <= tolerance, f"the gradient through {name} is not that of its weight: {far:.1e} apart"


def assert_fake_is_real(model: Module, trial: Trial, plan: BitPlan, tolerance: float) -> None:
    """`quantizer_fake_quantize` keeps shape and type and the given tensor; where no calibration enters, its numbers are
    those that the quantized module holds."""
    import torch

    fake, config = trial.hooks.quantizer_fake_quantize, trial.config(plan)
    for name in trial.infos(model):
        weight = trial.original(name)
        for given in (weight.to(torch.bfloat16), weight.clone()):
            kept = given.clone()
            back = fake(weight=given, config=config, bits=plan.bits, group_size=plan.group_size, stats=None)
            assert back.shape == given.shape and back.dtype == given.dtype, (
                f"quantizer_fake_quantize turns {tuple(given.shape)} {given.dtype} into "
                f"{tuple(back.shape)} {back.dtype}"
            )
            assert equal(given, kept), "quantizer_fake_quantize changes the weight that it is given"
        if trial.plugin.provides.dequantize and not trial.plugin.provides.calibration:
            real = trial.weight(model.get_submodule(name), name)
            far = ((back - real).abs().max() / real.abs().max()).item()
            groups = f" in groups of {plan.group_size}" if plan.group_size else ""
            assert far <= tolerance, (
                f"quantizer_fake_quantize of {name} ({plan.bits} bits{groups}) is not what quantizing gives: "
                f"{far:.1e} apart"
            )


def assert_requantized(model: Module, trial: Trial, plan: BitPlan, tolerance: float) -> None:
    """`quantizer_requantize` gives a module that holds the weight as nearly as its bits allow, uses it, and is in all
    else as the one before, which stays as it was."""
    name, info = next(iter(trial.infos(model).items()))
    module: Any = model.get_submodule(name)
    weight = trial.weight(module, name)
    once = (weight - trial.original(name)).norm().item()
    for what, wanted in (("its own weight", weight), ("a changed weight", weight.flip(0))):
        new: Any = trial.hooks.quantizer_requantize(
            module=module, weight=wanted.clone(), config=trial.config(plan), bits=plan.bits
        )
        held = trial.weight(new, name)
        far = (held - wanted).norm().item()
        assert far <= once, (
            f"{what}, put back by quantizer_requantize in {plan.bits} bits, is {far:.3g} off; "
            f"quantizing it the first time was {once:.3g}"
        )
        bias = offset(new)
        far = _apart_from_forward(new, held, bias.to(weight.device), weight.dtype)
        assert far <= tolerance, f"the module of quantizer_requantize uses other numbers: {far:.1e} apart"
        far = (bias - offset(module)).abs().max().item()
        assert far <= BIAS_NEAR, f"quantizer_requantize loses or changes the bias of {name}: {far:.1e} apart"
        model.set_submodule(name, new)
        now = trial.infos(model).get(name)
        model.set_submodule(name, module)
        assert now is not None and (now.bits, now.group_size) == (info.bits, info.group_size), (
            f"quantizer_requantize turns {name} of {info.bits} bits in groups of {info.group_size} into {now}"
        )
    assert equal(trial.weight(module, name), weight), "quantizer_requantize changes the module that it is given"


def _apart_from_forward(module: Any, weight: Tensor, bias: Tensor | float, dtype: Any) -> float:
    """How far the numbers that inputs of `dtype` are multiplied with are from `weight`, relative to its largest."""
    import torch

    with torch.no_grad():
        probes = PROBE * torch.eye(module.in_features, dtype=dtype, device=weight.device)
        used = (module(probes[None])[0].float() - bias).T / PROBE
    return ((used - weight).abs().max() / weight.abs().max()).item()
