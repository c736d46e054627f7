"""Which modules of a model are quantized, and how. Torch-free."""

from __future__ import annotations

import re

from hyperion_core.errors import Problem
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.suggest import did_you_mean

from .config import BLOCK_SIZES, DEFAULT_BLOCK, BnbConfig, block_size_problem, eight_bit_problems, listed

UNQUANTIZED = 16
WIDTHS = frozenset({4, 8})
WITHOUT_ITS_MODULE = "dt_proj"  # transformers: modeling_mamba, modeling_falcon_mamba, modeling_jamba


def chosen_modules(model: ModelFacts, config: BnbConfig, bits: BitPlan) -> dict[str, tuple[int, int]]:
    """(bits, block size) of each module that is to be quantized, by its name; block size 0 with 8 bits."""
    skipped = {module.name for module in model.matching(config.skip_modules)}
    found = {module.name: bits.of(module.name) for module in model.linear() if module.name not in skipped}
    return {
        name: (width, (group or config.group_size or DEFAULT_BLOCK) if width == 4 else 0)
        for name, (width, group) in found.items()
        if width != UNQUANTIZED
    }


def widths(bits: BitPlan) -> set[int]:
    """The bits that occur in a plan, without those that leave a module as it is."""
    return {width for width, _ in _pairs(bits)} - {UNQUANTIZED}


def plan_problems(config: BnbConfig, bits: BitPlan) -> list[Problem]:
    """What of a plan bitsandbytes cannot do on any model."""
    found, asked = [], widths(bits)
    if wrong := asked - WIDTHS:
        why, fix = f"it has formats of {listed(WIDTHS)} bits", f"take one of {listed(WIDTHS)}"
        found.append(Problem("bits", f"bitsandbytes cannot hold weights in {listed(wrong)} bits", why, fix))
    elif len(asked) > 1:
        why = "transformers loads a checkpoint of bitsandbytes in 4 bits or in 8, never in both"
        fix = "give one number for all; modules named in skip_modules keep 16 bits"
        found.append(Problem("bits", "bitsandbytes has the same bits in all modules", why, fix))
    elif not asked:
        found.append(Problem("bits", "16 bits quantize nothing", fix="set bits to 4 or 8, or leave out quantization"))
    groups = {width: {group for each, group in _pairs(bits) if each == width and group} for width in WIDTHS}
    found += [block_size_problem(size) for size in sorted(groups[4] - {*BLOCK_SIZES})]
    if asked == {8} and config.bits != 8:  # else the config has refused them
        found += eight_bit_problems({**config.given(), **({"group_size": groups[8]} if groups[8] else {})})
    return found


def skip_problems(config: BnbConfig, model: ModelFacts, bits: BitPlan) -> list[Problem]:
    """Names that no module has, plans that leave nothing to quantize, and modules that must be left out."""
    if not model.known:
        return []
    linear = {module.name for module in model.linear()}
    found = []
    for index, name in enumerate(config.skip_modules):
        named = {module.name for module in model.matching([name])}
        if named & linear:
            continue
        what, fix = f'no module is called "{name}"', did_you_mean(name, model.short_names())
        why = f"none of the {len(linear)} linear modules that could be quantized has that name, whole or at its end"
        if named:
            what, why, fix = (
                f'"{name}" is not quantized anyway',
                "only linear modules of the layers are",
                "leave it out",
            )
        found.append(Problem(f"skip_modules.{index}", what, why, fix))
    if not found and widths(bits) and not chosen_modules(model, config, bits):
        why = "skip_modules, or 16 bits, leave out every linear module"
        found.append(Problem("", "nothing would be quantized", why, "leave out quantization, or skip fewer"))
    if any(name.endswith(f".{WITHOUT_ITS_MODULE}") for name in chosen_modules(model, config, bits)):
        found.append(
            Problem(
                "skip_modules",
                f"{WITHOUT_ITS_MODULE} cannot be held in {listed(widths(bits))} bits",
                "transformers' Mamba multiplies with its weight itself, and finds packed numbers there",
                f'skip it: skip_modules: ["{WITHOUT_ITS_MODULE}"]',
            )
        )
    return found


def is_skipped(name: str, patterns: list[str]) -> bool:
    """transformers' rule for `llm_int8_skip_modules` (quantizers_utils.should_convert_module)."""
    edge = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{pattern}){edge}", name) or name.endswith(pattern) for pattern in patterns)


def _pairs(bits: BitPlan) -> list[tuple[int, int]]:
    return [(bits.bits, bits.group_size), *bits.overrides.values()]
