"""PEFT's LoRA layer with less arithmetic: one pass for all adapters of a layer, in the activations' own type.

PEFT casts the whole input to the adapter's float32, multiplies there, scales and casts back. Here the small matrices
are cast instead, the scale is folded into B, and only what the gradient needs is kept. Where a layer does more than
plain LoRA (dropout, DoRA, a merged weight, …), PEFT's own code runs; and wherever no gradient is asked for, so that
an evaluation measures what users of the saved adapter will get.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# PEFT's layers that call their base and add to it, plain or quantized.
_SPED_UP = frozenset({"Linear", "Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "TorchaoLoraLinear"})


def speed_up(model: nn.Module) -> None:
    """Give PEFT's LoRA layers in `model` the faster forward."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in _SPED_UP and kind.__module__.startswith("peft.tuners.lora."):
            module.__class__ = _faster(kind)


@cache
def _faster(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fast{kind.__name__}", (FastLoraLayer, kind), {})


class FastLoraLayer:
    """Mixed into a LoRA layer of PEFT: computes Wx + Σ sᵢ Bᵢ Aᵢ x in two products for all active adapters i."""

    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    training: bool
    scaling: dict[str, float]
    base_layer: nn.Module
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        asked = args or kwargs or self.disable_adapters or self.merged or not active or not torch.is_grad_enabled()
        device = x.device.type  # autocast over a base of another type is left to PEFT
        if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
            asked = True
        if asked or not self._is_plain(active):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x)
        if x.dtype != result.dtype or not x.dtype.is_floating_point:  # autocast over a base of another type
            return super().forward(x)  # type: ignore[misc]
        down = [self.lora_A[name].weight for name in active]
        up = [self.lora_B[name].weight for name in active]
        scales = tuple(self.scaling[name] for name in active)
        return _LowRank.apply(result, x, scales, *down, *up)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, it is PEFT's own layer: these classes are made as they are needed, and no module holds them."""
        return object.__new__, (type(self).__mro__[2],), self.__dict__

    def _is_plain(self, active: list[str]) -> bool:
        return not any(
            name in self.lora_variant
            or (self.training and not isinstance(self.lora_dropout[name], nn.Identity))
            or not isinstance(self.lora_A[name], nn.Linear)  # its weight may be computed from others
            or self.lora_B[name].bias is not None
            for name in active
        )


class _LowRank(torch.autograd.Function):
    """result (..., out) + Σ scaleᵢ (x Aᵢᵀ) Bᵢᵀ for x (..., in), Aᵢ (rᵢ, in) and Bᵢ (out, rᵢ)."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, scales: tuple[float, ...], *matrices: Tensor) -> Tensor:
        count = len(scales)
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            down = torch.cat([matrix.to(x.dtype) for matrix in matrices[:count]])
            scaled = [matrix * scale for matrix, scale in zip(matrices[count:], scales, strict=True)]
            up = torch.cat([matrix.to(x.dtype) for matrix in scaled], dim=1)
            inner = rows @ down.t()
            out = torch.addmm(result.reshape(-1, result.shape[-1]), inner, up.t())
        ctx.save_for_backward(rows, down, up, inner)
        ctx.scales, ctx.ranks, ctx.kinds = scales, [m.shape[0] for m in matrices[:count]], [m.dtype for m in matrices]
        ctx.shape = x.shape
        return out.view(result.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, up, inner = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_inner = flat @ up
        count = len(ctx.scales)
        found: list[Tensor | None] = [None] * (2 * count)
        if any(ctx.needs_input_grad[3 : 3 + count]):
            for number, part in enumerate((to_inner.t() @ rows).split(ctx.ranks)):
                found[number] = part.to(ctx.kinds[number])
        if any(ctx.needs_input_grad[3 + count :]):
            for number, part in enumerate((flat.t() @ inner).split(ctx.ranks, dim=1)):
                found[count + number] = part.to(ctx.kinds[count + number]) * ctx.scales[number]
        found = [part if needed else None for part, needed in zip(found, ctx.needs_input_grad[3:], strict=True)]
        to_x = (to_inner @ down).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return gradient, to_x, None, *found
