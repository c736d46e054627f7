"""Options of GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import Problem
from pydantic import Field


class GptqConfig(QuantizationConfig):
    """Options of GPTQ (Frantar et al. 2022, arXiv 2210.17323), by gptqmodel's names.

    Example: `GptqConfig(bits=3, group_size=64)`.
    """

    method: str | None = "gptq"
    sym: bool = Field(True, description="Steps on both sides of 0 alike; without, each group has its own zero point.")
    desc_act: bool = Field(
        False,
        description="Round the columns with the largest inputs first, and group them so: a little nearer, and slower"
        " to unpack. Without, the order changes within groups alone, and no group is torn apart.",
    )
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Share of the Hessian's mean diagonal that is added to it, so that it can be inverted."
    )

    mse: Annotated[float, Field(ge=0)] = Field(
        2.4,
        description="The scale of a group is the one with the least sum of |error| to this power, weighed as in GPTQ's"
        " loss. 0 takes that of its largest weight.",
    )

    embedding_bits: Literal[4, 8] | None = Field(
        None,
        description="Round the embedding and the output head too. Hyperion alone loads such a"
        " checkpoint. None leaves them as they are.",
    )

    distill_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Optimizer steps in which the scales of all groups learn, after rounding, to predict what the"
        " unquantized model does; it is held in memory beside. Each takes 4 rows of the calibration data.",
    )

    understood = frozenset({"group_size"})

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        return [_no_double_quant(p) if p.path == "double_quant" else p for p in super().contradictions(data)]


def _no_double_quant(problem: Problem) -> Problem:
    return replace(
        problem,
        what="GPTQ does not quantize the scales a second time",
        why="its checkpoints keep them in float16: 16 bits a group, 1/8 bit a weight in groups of 128",
        fix="leave double_quant out, or take a method that has it (bnb, at 4 bits)",
    )
