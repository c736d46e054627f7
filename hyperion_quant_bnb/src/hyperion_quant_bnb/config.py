"""What may stand below `quantization:` with `method: bnb`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import Problem
from pydantic import Field

#: Weights that share a scale: all that bitsandbytes has kernels for.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Where the user does not say; transformers' `BitsAndBytesConfig` knows no other.
DEFAULT_BLOCK = 64

_FOUR_BIT_ONLY = {
    "group_size": "each row of a weight has one scale",
    "double_quant": "there is one scale a row, too few to be worth quantizing",
    "quant_type": "8-bit weights are integers, steps of equal size",
    "compute_dtype": "LLM.int8 computes in the type that its inputs have",
}


class BnbConfig(QuantizationConfig):
    """4 bits: nf4 or fp4 in blocks (QLoRA, arXiv 2305.14314); 8 bits: integers, a scale a row (LLM.int8, 2208.07339).

    `group_size` is bitsandbytes' block size: 64, if not said; blocks run over the whole weight, row after row.

    Example: `BnbConfig(bits=4, group_size=128, double_quant=True, skip_modules=["down_proj"])`.
    """

    method: str | None = "bnb"
    quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="4 bits: where their 16 values lie. None is nf4, which fits weights better than fp4."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="4 bits: the type that weights are unpacked to and multiplied in. auto: that of the rest of the "
        "model; what a checkpoint says that is quantized already.",
    )
    skip_modules: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Names, or last parts of names, of linear modules that stay as they are."
    )

    @property
    def type_in_force(self) -> str:
        """ "nf4" or "fp4"."""
        return self.quant_type or "nf4"

    @property
    def double_quant_in_force(self) -> bool:
        """Whether scales are quantized too, in 8 bits and blocks of 256; they are unless the config says no."""
        return self.double_quant is not False

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        found = super().contradictions(data)
        size = data.get("group_size")
        if data.get("bits") == 8:
            return found + eight_bit_problems(data)
        if isinstance(size, int) and size > 0 and size not in BLOCK_SIZES:
            found.append(block_size_problem(size))
        return found


def eight_bit_problems(given: Mapping[str, Any]) -> list[Problem]:
    """What of these options means nothing with 8 bits. An option that asks for nothing stands against nothing."""
    nothing: Collection[Any] = (None, False, "auto")
    fix = "leave it out, or set bits: 4"
    return [
        Problem(key, f'"{key}" has no meaning with 8 bits', why, fix)
        for key, why in _FOUR_BIT_ONLY.items()
        if given.get(key) not in nothing
    ]


def block_size_problem(size: int) -> Problem:
    why = "group_size is the block size of bitsandbytes, which has kernels for a few sizes only"
    return Problem("group_size", f"blocks of {size} weights cannot be had", why, f"one of {listed(BLOCK_SIZES)}")


def listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
