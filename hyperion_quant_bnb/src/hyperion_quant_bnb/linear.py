"""Quantized modules that compute with the very weight that `dequantized` gives. Loaded with a model, so torch is here.

On a CPU, bitsandbytes 0.50 does not do that of itself, seen by experiment:
- its 4-bit unpacking is wrong where blocks do not divide the rows of a weight (128 on a width of 576), silently; asked
  for the weight as one long row it is right;
- in evaluation, on processors with AVX512-BF16, it packs 4-bit weights anew and rounds their scales to bfloat16: what
  is evaluated is not what was trained, and what is saved afterwards is neither;
- in evaluation, 8-bit modules round activations to 8 bits too, which in training they do not.
So there a module unpacks its weight, and multiplies; on CUDA bitsandbytes' own kernels run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hyperion_core.quiet import ON_IMPORT, errors_only
from torch.nn import functional

with errors_only(*ON_IMPORT):  # it asks for an optional package, whose kernel is not used here
    import bitsandbytes as bnb

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["bnb", "dequantized", "exact", "requantized", "rounded", "share_maps", "tensors"]

_FAST_BLOCK = 1024  # the CPU unpacks larger blocks by compiling code first, which takes many seconds


class Product(torch.autograd.Function):
    """x · Wᵀ + bias, where W is unpacked for the way there and again for the way back: it is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, bias: Tensor | None) -> Tensor:
        ctx.module = module
        return functional.linear(x, module.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        wanted, _, wanted_of_bias = ctx.needs_input_grad
        of_x = gradient @ ctx.module.unpacked(gradient.dtype) if wanted else None
        of_bias = gradient.flatten(end_dim=-2).sum(0) if wanted_of_bias else None
        return of_x, None, of_bias


class BlockLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit module; `compute_dtype` is set. bitsandbytes', PEFT's and transformers' code take it for theirs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return Product.apply(x.to(self.compute_dtype), self, bias).to(x.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        return _unpacked_4_bits(self.weight.data, self.weight.quant_state, dtype)


class RowLinear8bit(bnb.nn.Linear8bitLt):
    """An 8-bit module. `compute_dtype` is the type of what comes in."""

    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            with errors_only("bitsandbytes.autograd._functions"):  # says each time that it casts inputs to float16
                return super().forward(x)
        return Product.apply(x, self, None if self.bias is None else self.bias.to(x.dtype))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        return _unpacked_8_bits(self.state.CB, self.state.SCB, dtype)


def dequantized(module: Any) -> Tensor:
    """What forward multiplies with: fp32 (out, in)."""
    return module.unpacked(module.compute_dtype).float()


def exact(module: Any, compute_dtype: torch.dtype) -> Any:
    """The same module, of one of the classes above. Its tensors stay where they are."""
    module.compute_dtype = compute_dtype
    if isinstance(module, bnb.nn.Linear4bit):
        module.__class__ = BlockLinear4bit
        module.compute_type_is_set = True
        return module
    module.__class__ = RowLinear8bit
    if module.weight.CB is not None:
        module.init_8bit_state()  # bitsandbytes does so in the first forward
    return module


def requantized(module: Any, weight: Tensor, bits: int, block: int, quant_type: str, nested: bool) -> Any:
    """A new module that holds `weight`, with all else from `module`."""
    sizes, device = (module.in_features, module.out_features), module.weight.device
    given = weight.detach().to(device).contiguous()
    new: Any
    if bits == 4:
        new = bnb.nn.Linear4bit(*sizes, bias=False, device="meta")
        new.weight = bnb.nn.Params4bit(
            given, requires_grad=False, blocksize=block, compress_statistics=nested, quant_type=quant_type, module=new
        ).to(device)
    else:
        new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
        new.state.threshold = getattr(getattr(module, "state", None), "threshold", 0.0)
        packed, scales = _rounded_to_8_bits(given)
        new.weight = bnb.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)
    new.bias = module.bias
    return exact(new, module.compute_dtype).train(module.training)


def rounded(weight: Tensor, bits: int, block: int, quant_type: str, nested: bool) -> Tensor:
    """weight (out, in) as it comes back; float32."""
    if bits == 8:
        return _unpacked_8_bits(*_rounded_to_8_bits(weight), torch.float32)
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=block, compress_statistics=nested, quant_type=quant_type
    )
    return _unpacked_4_bits(packed, state, torch.float32)


def share_maps(modules: list[Module]) -> None:
    """One copy of the map of nested scales for all modules: a checkpoint brings each its own, 1 KiB."""
    first: dict[Any, Tensor] = {}
    for module in modules:
        nested: Any = getattr(getattr(module.weight, "quant_state", None), "state2", None)
        if nested is not None:
            known = first.setdefault(nested.code.device, nested.code)
            if torch.equal(known, nested.code):
                nested.code = known


def tensors(module: Any) -> list[Tensor]:
    """All that a quantized module holds."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        found = [module.weight, module.state.SCB if module.weight.SCB is None else module.weight.SCB]
    else:
        state = module.weight.quant_state
        found = [module.weight, state.absmax, state.code]
        if state.nested:
            found += [state.offset, state.state2.absmax, state.state2.code]
    return [*found, *([] if module.bias is None else [module.bias])]


def _rounded_to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return packed, scales


def _unpacked_8_bits(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def _unpacked_4_bits(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    scales, block, shape = state.absmax, state.blocksize, state.shape
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    if packed.device.type == "cpu":
        if block > _FAST_BLOCK:
            scales, block = scales.repeat_interleave(block // _FAST_BLOCK), _FAST_BLOCK
        shape = (shape.numel(),)
    unpack = torch.ops.bitsandbytes.dequantize_4bit.default
    return unpack(packed, scales, block, state.quant_type, shape, dtype).reshape(state.shape)
