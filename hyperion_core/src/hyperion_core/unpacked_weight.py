"""A weight that a quantized module unpacks anew each time it is asked for: to be read, never to be written into."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from .errors import CompatibilityError

if TYPE_CHECKING:
    from torch import Tensor


def unpacked_weight(weight: Tensor) -> Tensor:
    """`weight` itself for who reads it; what it computes are ordinary tensors.

    Assigning to its `data`, as PEFT's own merge does, raises a CompatibilityError: the packed weight would not change,
    and what was to be merged would be lost without a word.
    """
    return cast("Tensor", weight.as_subclass(_read_only()))


@cache
def _read_only() -> type[Tensor]:
    torch: Any = sys.modules["torch"]  # whose tensor it is: the core itself asks for none

    class UnpackedWeight(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @property
        def data(self) -> Any:
            return self.detach().as_subclass(torch.Tensor)

        @data.setter
        def data(self, value: Tensor) -> None:
            raise CompatibilityError(
                "a packed weight cannot be written into",
                why="it is unpacked anew each time that it is read, so that what is written would be lost",
                fix="merge an adapter into a quantized base with `hyperion merge`, not with PEFT's merge_and_unload",
            )

    return cast("type[Tensor]", UnpackedWeight)
