"""PEFT's LoRA layer with less arithmetic: one pass for all adapters of a layer, in the activations' own type.

PEFT casts the whole input to the adapter's float32, multiplies there, scales and casts back. Here the small matrices
are cast instead, the scale is folded into B, and only what the gradient needs is kept: the input as it came, whose
memory the layers that share it share, and r numbers a token. The dropout of one adapter adds its mask, a byte for each
number of the input. It is drawn as torch draws it for PEFT, in the same order, and what it leaves of the input is
computed again for the gradient of A.

Where a layer does more than that (DoRA, a merged weight, …), PEFT's own code runs; and wherever neither a gradient is
asked for nor anything dropped, so that an evaluation measures what users of the saved adapter will get.
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
        dropout = self._dropout(active)
        # Reentrant checkpointing runs a forward pass without gradient first, which has to drop what the second does.
        measured = not torch.is_grad_enabled() and not dropout
        asked = args or kwargs or self.disable_adapters or self.merged or not active or measured
        device = x.device.type  # autocast over a base of another type is left to PEFT
        if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
            asked = True
        if asked or dropout is None or not self._is_plain(active):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x)
        if x.dtype != result.dtype or not x.dtype.is_floating_point:  # autocast over a base of another type
            return super().forward(x)  # type: ignore[misc]
        down = [self.lora_A[name].weight for name in active]
        up = [self.lora_B[name].weight for name in active]
        scales = tuple(self.scaling[name] / (1 - dropout) for name in active)
        return _LowRank.apply(result, x, dropout, scales, *down, *up)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, it is PEFT's own layer: these classes are made as they are needed, and no module holds them."""
        return object.__new__, (type(self).__mro__[2],), self.__dict__

    def _dropout(self, active: list[str]) -> float | None:
        """The probability of an element of the input to be dropped; None where PEFT does what is not done here."""
        acting = [self.lora_dropout[name] for name in active if self.lora_dropout[name].training]
        acting = [module for module in acting if not isinstance(module, nn.Identity)]
        if not acting:
            return 0.0
        if len(active) > 1 or type(acting[0]) is not nn.Dropout or acting[0].p == 1:
            return None
        probability: float = acting[0].p
        return probability

    def _is_plain(self, active: list[str]) -> bool:
        return not any(
            name in self.lora_variant
            or not isinstance(self.lora_A[name], nn.Linear)  # its weight may be computed from others
            or self.lora_B[name].bias is not None
            for name in active
        )


class _LowRank(torch.autograd.Function):
    """result (..., out) + Σ scaleᵢ (x Aᵢᵀ) Bᵢᵀ for x (..., in), Aᵢ (rᵢ, in) and Bᵢ (out, rᵢ).

    Elements of x are zero with the probability `dropout`; the scales make up for them.
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, dropout: float, scales: tuple[float, ...], *matrices: Tensor
    ) -> Tensor:
        count = len(scales)
        rows = x.reshape(-1, x.shape[-1])
        mask = _mask(x, dropout).reshape(rows.shape) if dropout else None
        with torch.autocast(x.device.type, enabled=False):
            down = torch.cat([matrix.to(x.dtype) for matrix in matrices[:count]])
            scaled = [matrix * scale for matrix, scale in zip(matrices[count:], scales, strict=True)]
            up = torch.cat([matrix.to(x.dtype) for matrix in scaled], dim=1)
            inner = _masked(rows, mask) @ down.t()
            out = torch.addmm(result.reshape(-1, result.shape[-1]), inner, up.t())
        ctx.save_for_backward(rows, mask, down, up, inner)
        ctx.scales, ctx.ranks, ctx.kinds = scales, [m.shape[0] for m in matrices[:count]], [m.dtype for m in matrices]
        ctx.shape = x.shape
        return out.view(result.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, mask, down, up, inner = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_inner = flat @ up
        count = len(ctx.scales)
        found: list[Tensor | None] = [None] * (2 * count)
        if any(ctx.needs_input_grad[4 : 4 + count]):
            for number, part in enumerate((to_inner.t() @ _masked(rows, mask)).split(ctx.ranks)):
                found[number] = part.to(ctx.kinds[number])
        if any(ctx.needs_input_grad[4 + count :]):
            for number, part in enumerate((flat.t() @ inner).split(ctx.ranks, dim=1)):
                found[count + number] = part.to(ctx.kinds[count + number]) * ctx.scales[number]
        found = [part if needed else None for part, needed in zip(found, ctx.needs_input_grad[4:], strict=True)]
        to_x = _masked(to_inner @ down, mask).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return gradient, to_x, None, None, *found


def _mask(x: Tensor, dropout: float) -> Tensor:
    """What is kept of `x`, drawn as torch's dropout draws it: by a kernel of its own wherever x is not on the CPU."""
    if x.device.type == "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    return torch.native_dropout(x, dropout, True)[1]


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else torch.where(mask, rows, 0.0)
