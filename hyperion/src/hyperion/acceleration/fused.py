"""RMSNorm and gated MLPs with the gradient written out: fewer passes over the activations, and fewer of them kept.

A module is recognised by what it holds, and is replaced only where the replacement gives the same outputs and gradients
as the module itself on a few random tokens: an architecture that computes something else keeps its own code. As Liger
does on GPUs (Hsu et al. 2024, arXiv:2410.10989), but for one model at a time, and taken back at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import silu

from ..engine.random_state import untouched_generators

_CHECKED_TOKENS = 5
_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def fused(model: Module) -> Iterator[Counter[str]]:
    """Inside, the RMSNorms and SwiGLU MLPs of `model` run fused; counts what was replaced, by kind."""
    replaced: list[Module] = []
    counts: Counter[str] = Counter()
    verdicts: dict[tuple[object, ...], bool] = {}
    try:
        for module in model.modules():
            kind, forward = _replacement(module)
            if forward is None or "forward" in vars(module):
                continue
            settings = sorted(
                (n, v) for n, v in vars(module).items() if isinstance(v, (int, float)) and n != "training"
            )
            key = (type(module), *settings, *((tuple(p.shape), p.dtype) for p in module.parameters()))
            if key not in verdicts:
                verdicts[key] = _same(module, forward)
            if verdicts[key]:
                module.forward = forward  # a method, whose copy belongs to the copy of the module
                replaced.append(module)
                counts[kind] += 1
        yield counts
    finally:
        for module in replaced:
            del module.forward


def _replacement(module: Module) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if "RMSNorm" in type(module).__name__ and parameters == ["weight"] and not list(module.children()):
        epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
        weight: Any = module.weight
        if isinstance(epsilon, float) and not weight.requires_grad:
            return "RMSNorm", MethodType(lambda self, x: _RMSNorm.apply(x, self.weight, epsilon), module)
    gated = {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    if gated and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return "SwiGLU", MethodType(_swiglu, module)
    return "", None


def _swiglu(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_SiLUGate.apply(self.gate_proj(x), self.up_proj(x)))


def _same(module: Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether outputs, and gradients of the input, agree to rounding."""
    # quantized layers may hold buffers alone
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype.is_floating_point]
    width = getattr(getattr(module, "gate_proj", module), "in_features", None) or (tensors and tensors[0].shape[-1])
    if not tensors or not width:
        return False
    dtype, device = tensors[0].dtype, tensors[0].device
    training = module.training
    allowed = 8 * torch.finfo(dtype).eps
    try:
        with untouched_generators():
            # in training too, where it may drop activations; and with large numbers, which it may clamp
            for trains, size in ((False, 1.0), (True, 1.0), (False, 30.0)):
                module.train(trains)
                torch.manual_seed(0)
                x = (size * torch.randn(1, _CHECKED_TOKENS, width)).to(device, dtype)
                own, mine = _outcome(module, x), _outcome(forward, x)
                for one, other in zip(own, mine, strict=True):
                    distance = float((other.float() - one.float()).norm())
                    if other.dtype != one.dtype or not distance <= allowed * float(one.float().norm()):
                        return False
    except (RuntimeError, TypeError, ValueError):  # it is not called like this
        return False
    finally:
        module.train(training)
    return True


def _outcome(way: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Its output for x, and a gradient of x."""
    torch.manual_seed(1)
    given = x.clone().requires_grad_()
    out = way(given)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), given)
    return out.detach(), gradient


class _RMSNorm(torch.autograd.Function):
    """y = w · x / sqrt(mean(x²) + ε) (Zhang & Sennrich 2019, arXiv:1910.07467), in float32, over (..., H).

    Keeps x and one number a token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float() if x.dtype != torch.float32 else x.clone()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        scaled = (gradient * weight).float()
        wide = x.float()
        along = torch.linalg.vecdot(scaled, wide)[..., None] * inverse.square() / x.shape[-1]
        return scaled.addcmul_(wide, along, value=-1).mul_(inverse).to(x.dtype), None, None


class _SiLUGate(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020, arXiv:2002.05202). Keeps its two inputs, not the activation between them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)
