"""What a user may write below `quantization:` with this method, and what follows from it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import Problem
from pydantic import Field

#: Weights that share a scale where the user does not say: the first of these that divides a layer's width.
GROUP_SIZES = (128, 64, 32, 16, 8)


class TorchaoConfig(QuantizationConfig):
    """Options of torchao's `IntxWeightOnlyConfig`.

    Example: `TorchaoConfig(bits=3, group_size=64)`.
    """

    method: str | None = "torchao"
    sym: bool = Field(True, description="Steps on both sides of 0 alike; without, each group has a zero point as well.")
    intx_choose_qparams_algorithm: Literal["hqq_scale_only", "affine"] | None = Field(
        None,
        description='How a group\'s step is found: "hqq_scale_only" searches the least squared error, "affine" takes it'
        " from the group's extremes. None: the search with sym, the extremes without.",
    )

    understood = frozenset({"group_size"})

    @property
    def algorithm(self) -> Literal["hqq_scale_only", "affine"]:
        """The one in force."""
        return self.intx_choose_qparams_algorithm or ("hqq_scale_only" if self.sym else "affine")

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        found = [_no_double_quant(p) if p.path == "double_quant" else p for p in super().contradictions(data)]
        if data.get("sym") is False and data.get("intx_choose_qparams_algorithm") == "hqq_scale_only":
            what = "hqq_scale_only knows no zero points, and sym: false asks for them"
            why, fix = "torchao searches the scale of a symmetric grid alone", 'take "affine", or leave out sym'
            found.append(Problem("intx_choose_qparams_algorithm", what, why, fix))
        return found


def default_group_size(width: int) -> int:
    """Weights that share a scale in a layer of `width` inputs; 0 where none of `GROUP_SIZES` divides it."""
    return next((size for size in GROUP_SIZES if width % size == 0), 0)


def _no_double_quant(problem: Problem) -> Problem:
    return replace(
        problem,
        what="torchao does not quantize the scales a second time",
        why="its integer formats have none of it; the scales take 16 bits a group, 1/8 bit a weight in groups of 128",
        fix="leave double_quant out, or take a method that has it (bnb, at 4 bits)",
    )
