"""A linear module that holds its weight as checkpoints of GPTQ do, and trains under an adapter. Loaded only with torch.

gptqmodel's own modules are not used to load: they compile themselves, keep unpacked copies, and hold the whole weight
of every layer from forward to backward. The names and the layout of the tensors are theirs, and so are the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from hyperion_core.facts import ModelFacts
from hyperion_core.live_facts import live_model_facts
from hyperion_core.unpacked_weight import unpacked_weight
from torch import Tensor, nn

from .cpu_kernel import KernelWeight, serves, suits, unpacked_product
from .packed_embedding import PackedEmbedding, PackedHead
from .packing import pack, pack_zeros, unpack, unpack_zeros
from .rounding import Rounded, in_order, restored


class PackedLinear(nn.Linear):  # PEFT and others ask for nn.Linear
    """y = x Wᵀ + b.

    Buffers: `qweight` int32 (in * bits / 32, out); `qzeros` int32 (groups, out * bits / 32); `scales` float16
    (groups, out); `g_idx` int32 (in,), the group of each input. `version` is the format's: 1 ("gptq") holds zero points
    less one, 2 ("gptq_v2") as they are.
    """

    _is_hf_initialized = True  # transformers would fill `weight` at random, to no effect but the time

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self, shape: tuple[int, int], bias: nn.Parameter | None, bits: int, group_size: int, *, sym: bool, version: int
    ) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight in full precision
        self.out_features, self.in_features = rows, columns = shape
        self.bits, self.group_size, self.sym, self.version = bits, group_size, sym, version
        self.bias = cast(nn.Parameter, bias)
        groups = columns // group_size
        self.register_buffer("qweight", torch.zeros(columns * bits // 32, rows, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, rows * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, rows, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(columns, dtype=torch.int32))
        self._ordered = self._suits_kernel = False
        self._kernel: KernelWeight | None = None

    def hold(self, found: Rounded) -> None:
        """Pack what was found for this module."""
        self.qweight, self.scales, self.g_idx = pack(found.numbers, self.bits), found.scale, found.g_idx
        self.qzeros = pack_zeros(found.zero, self.bits, self.version)
        self.settle()

    def settle(self) -> None:
        """Look, once its tensors are there, whether the groups are stretches of the row: these unpack faster. And
        whether 0 is in the middle of the grid of all groups besides: these fit the kernel."""
        self._ordered = torch.equal(self.g_idx, in_order(self.in_features, self.group_size, self.g_idx.device))
        zeros = unpack_zeros(self.qzeros, self.bits, self.version)
        centred = self._ordered and bool((zeros == 2 ** (self.bits - 1)).all())
        self._suits_kernel = centred and suits((self.out_features, self.in_features), self.group_size)
        self._kernel = None

    def grid(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Numbers less their zero points, int8 or int16 (out, in); scales, float16 (out, groups); and, where the
        columns of the first two do not stand for the inputs as they come, for which each does, int64 (in,)."""
        zeros = unpack_zeros(self.qzeros, self.bits, self.version).short()
        numbers = unpack(self.qweight, self.bits).short() - zeros[self.g_idx.long()]
        order = None if self._ordered else self.g_idx.argsort(stable=True)
        numbers = numbers.T if order is None else numbers.T[:, order]
        small = torch.int8 if self.bits < 8 else torch.int16
        return numbers.to(small).contiguous(), self.scales.T.contiguous(), order

    def take_scales(self, scale: Tensor) -> None:
        """Others in their place: float16 (out, groups)."""
        self.scales, self._kernel = scale.T.contiguous(), None

    @property
    def weight(self) -> Tensor:
        """What forward uses, float32 (out, in); made anew each time."""
        return unpacked_weight(self.unpacked().float())

    def unpacked(self) -> Tensor:
        """The same, float16: it has no more digits."""
        zeros = unpack_zeros(self.qzeros, self.bits, self.version)
        found = Rounded(unpack(self.qweight, self.bits), self.scales, zeros, self.g_idx)
        return restored(found, ordered=self._ordered)

    def forward(self, input: Tensor) -> Tensor:
        if self._suits_kernel and serves(input):
            y = self._packed_for_kernel().product(input)
        else:
            y = cast(Tensor, _Product.apply(input, self))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _packed_for_kernel(self) -> KernelWeight:
        """Kept from the first product that it serves: as many bytes again."""
        if self._kernel is None:
            self._kernel = KernelWeight(unpack(self.qweight, self.bits).T, self.scales.T, self.bits)
        return self._kernel

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scales, self._kernel = self.scales, None
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # a model is cast as a whole; bfloat16 would round these
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, sym={self.sym}"


class _Product(torch.autograd.Function):
    """x · Wᵀ. Autograd alone would keep every W whole until the way back; here it is unpacked again instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return unpacked_product(x, module.unpacked())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return unpacked_product(gradient, ctx.module.unpacked().T), None


class _Sizes:
    """A packed module for who asks for its sizes alone: nothing is unpacked."""

    weight: Any = None

    def __init__(self, module: nn.Linear) -> None:
        self.in_features, self.out_features, self.bias = module.in_features, module.out_features, module.bias

    def named_children(self) -> tuple[()]:
        return ()


class _EmbeddingSizes:
    def __init__(self, module: PackedEmbedding) -> None:
        self.weight, self.embedding_dim = module.table.packed, module.embedding_dim

    def named_children(self) -> tuple[()]:
        return ()


def facts_of(model: nn.Module) -> ModelFacts:
    """`live_model_facts`, without unpacking a weight."""

    def unwrap(module: Any) -> Any:
        if isinstance(module, PackedLinear):
            return _Sizes(module)
        if isinstance(module, PackedHead):
            sizes = _Sizes(module)
            sizes.weight = module.held.packed
            return sizes
        return _EmbeddingSizes(module) if isinstance(module, PackedEmbedding) else module

    return live_model_facts(model, unwrap=unwrap)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """By name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def is_conv1d(linear: Any) -> bool:
    """transformers' Conv1D, which GPT-2 is made of, is a linear module that holds its weight the other way round."""
    return hasattr(linear, "nf") and hasattr(linear, "nx")


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in)."""
    return (linear.nf, linear.nx) if is_conv1d(linear) else (linear.out_features, linear.in_features)
