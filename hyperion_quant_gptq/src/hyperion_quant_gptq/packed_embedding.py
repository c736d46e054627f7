"""Embeddings in 4 or 8 bits, and the output head that shares their weight. Loaded only with torch.

Checkpoints of GPTQ know nothing of this: such a model is for Hyperion alone. A weight that both share is rounded for
the head, by GPTQ: what is lost, is lost there. With nothing but this weight in 4 bits, in groups of 64, SmolLM2-135M is
so far from the unquantized model, in nats a token: 0.118 where it is rounded to the nearest, of which 0.011 are by the
embedding and 0.107 by the head; 0.068 where it is rounded by what flows into the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from hyperion_core.errors import CompatibilityError
from hyperion_core.unpacked_weight import unpacked_weight
from torch import Tensor, nn

from .cpu_kernel import KernelWeight, serves, suits, unpacked_product
from .grouping import default_group_size
from .rounding import Rounded, rounded

_NIBBLE = 4


class PackedTable(nn.Module):
    """A matrix (rows, width).

    Buffers: `packed` uint8 (rows, width * bits / 8), the first of two numbers in the lower bits; `scale` float16
    (rows, groups), kept as int16, so that nothing that casts a model to another type can round it.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], bits: int) -> None:
        super().__init__()
        self.shape, self.bits = shape, bits
        rows, width = shape
        self.group_size = default_group_size(width)
        self.register_buffer("packed", torch.zeros(rows, width * bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, width // self.group_size, dtype=torch.int16))
        self._suits_kernel = suits(shape, self.group_size)
        self._kernel: KernelWeight | None = None

    def hold(self, found: Rounded) -> PackedTable:
        """What was found for this weight, on a symmetric grid, in groups that are stretches of its rows."""
        numbers = found.numbers.T.contiguous()
        self.packed = numbers if self.bits > _NIBBLE else numbers[:, ::2] | numbers[:, 1::2] << _NIBBLE
        self.scale = found.scale.T.contiguous().view(torch.int16)
        self._kernel = None
        return self

    def grid(self) -> tuple[Tensor, Tensor]:
        """Numbers, int8 (rows, width), 0 where the weight is 0, and scales, float16 (rows, groups)."""
        middle = 2 ** (self.bits - 1)
        return (_numbers(self.packed, self.bits).short() - middle).to(torch.int8), self.scale.view(torch.float16)

    def take_scales(self, scale: Tensor) -> None:
        """Others in their place: float16 (rows, groups)."""
        self.scale, self._kernel = scale.contiguous().view(torch.int16), None

    def rows(self, ids: Tensor | None = None) -> Tensor:
        """Float32 (..., width) of these rows, int64 (...); by default all."""
        packed, scale = (each if ids is None else each[ids] for each in (self.packed, self.scale))
        weight = (_numbers(packed, self.bits).float() - 2 ** (self.bits - 1)).unflatten(-1, (-1, self.group_size))
        return (weight * scale.view(torch.float16).float().unsqueeze(-1)).flatten(-2)

    def product(self, x: Tensor) -> Tensor:
        """x · Wᵀ: (..., width) to (..., rows)."""
        if self._suits_kernel and serves(x):
            if self._kernel is None:
                scale = self.scale.view(torch.float16)
                self._kernel = KernelWeight(_numbers(self.packed, self.bits), scale, self.bits)
            return self._kernel.product(x)
        return cast(Tensor, _Product.apply(x, self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTable:
        self._kernel = None
        return super()._apply(fn, recurse)


class PackedEmbedding(nn.Module):
    """Rows of a table by their ids."""

    def __init__(self, table: PackedTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype
        self.num_embeddings, self.embedding_dim = table.shape

    @property
    def weight(self) -> Tensor:
        """All rows, in the model's type; made anew each time."""
        return unpacked_weight(self.table.rows().to(self.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self.table.rows(input).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # `model.to(dtype)` casts what comes out of it too
        return super()._apply(fn, recurse)


class PackedHead(nn.Linear):  # PEFT and others ask for nn.Linear
    """y = x Wᵀ + b over a table: an embedding's, or its own."""

    def __init__(self, table: PackedTable, bias: nn.Parameter | None, *, shared: bool) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight in full precision
        self.out_features, self.in_features = table.shape
        self.bias = cast(nn.Parameter, bias)
        self.shared = shared
        self._table = [] if not shared else [table]  # in a list: the embedding alone saves it
        if not shared:
            self.table = table

    @property
    def held(self) -> PackedTable:
        """Where its weight is."""
        return self._table[0] if self.shared else self.table

    @property
    def weight(self) -> Tensor:
        """Float32 (out, in); made anew each time."""
        return unpacked_weight(self.held.rows())

    def forward(self, input: Tensor) -> Tensor:
        y = self.held.product(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x · Wᵀ. Autograd alone would keep W whole until the way back; here it is unpacked again instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: PackedTable) -> Tensor:
        ctx.table = table
        return unpacked_product(x, table.rows())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return unpacked_product(gradient, ctx.table.rows().T), None


def pack_embeddings(model: Any, bits: int, head_rounded: Rounded | None = None) -> None:
    """Put packed modules in the place of a model's embedding and output head, or of the one weight that both share.

    Args:
        head_rounded: the head's weight; without, what they hold is to be loaded.

    Raises:
        CompatibilityError: as `refuse_unpackable`.
    """
    refuse_unpackable(model)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head.weight is embedding.weight or bool(model.config.get_text_config().tie_word_embeddings)
    table = _table(embedding.weight, bits)
    if head_rounded is not None:
        table.hold(head_rounded if shared else rounded(embedding.weight, bits, table.group_size, sym=True))
    model.set_submodule(names[id(embedding)], PackedEmbedding(table, embedding.weight.dtype))
    own = table if shared else _table(head.weight, bits)
    if head_rounded is not None and not shared:
        own.hold(head_rounded)
    model.set_submodule(names[id(head)], PackedHead(own, head.bias, shared=shared))
    # Nothing is left for transformers to tie: the table is one.
    tied = f"{names[id(head)]}.weight"
    for key in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, key, None) or {}
        setattr(model, key, {name: source for name, source in known.items() if name != tied})


def refuse_unpackable(model: Any) -> None:
    """Of embedding and output head.

    Raises:
        CompatibilityError: one of them does more than an ordinary one.
    """
    for module, ordinary in ((model.get_input_embeddings(), nn.Embedding), (model.get_output_embeddings(), nn.Linear)):
        if type(module) is not ordinary:
            raise CompatibilityError(
                f"the embeddings of a {type(model).__name__} cannot be packed",
                why=f"one is a {type(module).__name__}, which does more than {ordinary.__name__} does",
                fix="leave embedding_bits out",
            )


def embedding_bits(model: Any) -> int | None:
    """In which it is packed; None is not at all."""
    embedding = model.get_input_embeddings()
    return embedding.table.bits if isinstance(embedding, PackedEmbedding) else None


def _table(weight: Tensor, bits: int) -> PackedTable:
    with weight.device:
        return PackedTable((weight.shape[0], weight.shape[1]), bits)


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """uint8 (..., width)."""
    return packed if bits > _NIBBLE else torch.stack([packed & 15, packed >> _NIBBLE], -1).flatten(-2)
