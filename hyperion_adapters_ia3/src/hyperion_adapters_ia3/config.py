"""The options of (IA)³: PEFT's own names, checked without importing PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hyperion_core.config import AdapterConfig
from hyperion_core.errors import Problem
from hyperion_core.foreign import with_foreign_fields
from pydantic import Field

from hyperion_peft import pattern_problems

REFUSED: Mapping[str, str] = {
    "fan_in_fan_out": "it follows from the kind of each module, and is set accordingly",
}


@with_foreign_fields("peft", "tuners/ia3/config.py", "IA3Config", leave_out=tuple(REFUSED))
class IA3Config(AdapterConfig):
    """(IA)³ (Liu et al. 2022, arXiv:2205.05638): learnt factors on keys, values and inner feed-forward activations.

    An attention module's output is multiplied by a vector (out,), a feed-forward module's input by one (in,).

    Example: `IA3Config()` finds the modules itself.
    """

    type: str = "ia3"
    target_modules: str | list[str] | None = Field(
        None,
        description="Modules to scale: names or last parts of names, a regular expression over whole names, or"
        ' "all-linear". Left out: keys, values and the second feed-forward projection, found by name and shape.',
    )
    feedforward_modules: str | list[str] | None = Field(
        None,
        description="Those of target_modules whose input is scaled, not their output. Left out: found by their shapes.",
    )
    exclude_modules: str | list[str] | None = Field(None, description="Modules to leave out, named as target_modules.")
    modules_to_save: list[str] | None = Field(None, description="Modules to train in full and save beside the adapter.")
    init_ia3_weights: bool = Field(True, description="Start at ones, which changes nothing; false starts at random.")
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="Causal language models only.")

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        problems = [
            Problem(key, f'"{key}" of PEFT cannot be used here', REFUSED[key], "leave it out")
            for key in data
            if key in REFUSED
        ]
        problems += pattern_problems(data)
        targets, inner = data.get("target_modules"), data.get("feedforward_modules")
        if isinstance(targets, list) and not targets:
            problems.append(Problem("target_modules", "target_modules is empty", "nothing would be trained",
                                    "name modules, or leave it out"))  # fmt: skip
        if isinstance(targets, list) and isinstance(inner, list):
            stray = [name for name in inner if name not in targets]
            if stray:
                problems.append(
                    Problem("feedforward_modules", f"{', '.join(map(repr, stray))} is not among target_modules",
                            "feedforward_modules says how some of the target modules are scaled",
                            "add it to target_modules")
                )  # fmt: skip
        if inner is not None and targets is None:
            problems.append(
                Problem("feedforward_modules", "feedforward_modules alone means nothing",
                        "it says how some of target_modules are scaled", "add target_modules")
            )  # fmt: skip
        return problems
