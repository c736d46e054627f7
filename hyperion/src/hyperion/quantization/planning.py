"""How the base will be held, settled before anything is loaded. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import CompatibilityError, ConfigError, DataError, HyperionError, ModelError, Problem
from hyperion_core.facts import BitPlan, Cost, ModelFacts
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Quantizer
from hyperion_core.registry import registry

from ..data.arguments import DataArgumentsError
from ..data.processor import DatasetProcessor
from ..models.source import BaseModelSource
from ..optimization.memory_model import BYTES
from ..planning_hooks import PlanningHooks
from .allocation import shared_group
from .existing import reader_of, recognized, refuse_other, saved_quantization

if TYPE_CHECKING:
    from ..config import FinetuneConfig

#: Files of a run's folder: the bits of each module, and the picture of them.
BIT_PLAN = "bit_plan.json"
HEAT_MAP = "bit_plan.png"
#: Widths that bits: auto chooses from, of those that a quantizer has; 16 is there for all. 5 and 6 bits were paid for
#: with more modules in 2, whose losses together are more than their sum: perplexity at 3 bits went from 18.7 to 21.9.
CANDIDATES = frozenset({2, 3, 4, 8})


@dataclass(frozen=True)
class PlannedBits:
    """`known` are the bits of the run; None where they are shared out once the weights have been measured, and
    `assumed` is planned with. `made_for`: the method that a file of bits says they were shared out for, or ""."""

    known: BitPlan | None
    assumed: BitPlan
    made_for: str = ""


def uniform_bits(config: QuantizationConfig) -> BitPlan:
    """The same bits everywhere; group size 0 is the method's own."""
    assert isinstance(config.bits, int)
    return BitPlan(config.bits, config.group_size or 0)


def with_checkpoint(
    config: FinetuneConfig, source: BaseModelSource | None, facts: ModelFacts, problems: list[Problem]
) -> tuple[FinetuneConfig, BitPlan | None]:
    """The config that is in force, and the bits of a base that is quantized already: that one brings its method and
    its options along, where the config does not say them."""
    if source is None or source.path is None or source.kind == "gguf":
        return config, None
    asked = config.quantization
    try:
        saved = saved_quantization(source.path)
        if saved is None:
            return config, None
        method = asked.method if asked else reader_of(saved["quant_method"])
        if method is None:
            problems.append(_unread(source.name, saved["quant_method"]))
            return config, None
        hooks = RunHooks()
        hooks.add(registry().create("quantizer", method), method)
        named = asked or QuantizationConfig(method=method)
        options, bits = recognized(saved, named, PlanningHooks(hooks), facts)
        refuse_other(options, bits, named, facts.source)
        given = asked.given() if asked else {}
        settled = config.replace(quantization={**given, **options, "method": method})
        assert settled.quantization is not None
        why = asked.why_chosen if asked else "the base is quantized already, and it loads that"
        return settled.replace(quantization=settled.quantization.chosen_because(why)), bits
    except ModelError as error:
        problems.append(Problem("base_model", error.what, error.why, error.fix))
    except ConfigError as error:
        problems += error.problems
    except CompatibilityError as error:
        problems.append(Problem("quantization", error.what, error.why, error.fix))
    return config, None


def planned_bits(
    quantization: QuantizationConfig | None, base_dir: Path | None, hooks: PlanningHooks, facts: ModelFacts,
    saved: BitPlan | None, device: str, dtype: str, problems: list[Problem],
) -> PlannedBits | None:  # fmt: skip
    """The bits of each module, and what stands against them; None without quantization.

    Args:
        base_dir: where relative paths of the config start.
        saved: the bits of a base that is quantized already.
        dtype: of what is not quantized.
    """
    if quantization is None:
        return None
    found: list[Problem] = []
    provides = cast(Quantizer, hooks.plugin("quantizer", str(quantization.method))).provides
    if not provides.per_module and not saved and quantization.bits == "auto":
        problems.append(_same_everywhere(quantization))
        return None
    try:
        bits = PlannedBits(saved, saved) if saved else _bits(quantization, provides.bits, facts, base_dir)
    except HyperionError as error:
        given = error.problems if isinstance(error, ConfigError) else [Problem("", error.what, error.why, error.fix)]
        problems += [problem.at("quantization") for problem in given]
        return None
    if not provides.per_module and bits.known and len(set(bits.known.overrides.values())) > 1:
        problems.append(_same_everywhere(quantization))
        return bits
    driver = hooks.quantizer(str(quantization.method))
    tried = [bits.known] if bits.known else [BitPlan(b, bits.assumed.group_size) for b in _candidates(provides.bits)]
    for plan in tried:
        for each in driver.quantizer_check(config=quantization, model=facts, bits=plan, device=device) or []:
            if each not in found:
                found.append(each)
    if not found and bits.known is None and facts.known:
        found += _budget_problems(quantization, hooks, facts, min(_candidates(provides.bits)), dtype)
    found += _calibration_problems(quantization, base_dir, measured=provides.calibration or bits.known is None)
    problems += [problem.at("quantization") for problem in found]
    return bits


def _same_everywhere(quantization: QuantizationConfig) -> Problem:
    key = "bit_plan" if quantization.bit_plan else "bits"
    why = "all modules of a model that it quantizes have the same bits"
    fix = "choose a method that has bits by module, or give one number for all"
    return Problem(f"quantization.{key}", f'"{quantization.method}" has no bits by module', why, fix)


def quantized_cost(
    config: QuantizationConfig, hooks: PlanningHooks, facts: ModelFacts, bits: PlannedBits, dtype: str
) -> Cost:
    """Of the whole base: "weights", and "loading", what is read beside them where loading quantizes."""
    if bits.known is None and config.budget_mb is not None:
        budget = int(config.budget_mb * 1e6)
        cost = Cost({"weights": budget}, disk=budget)
    else:
        cost = hooks.quantizer(str(config.method)).quantizer_estimate(
            config=config, model=facts, bits=bits.assumed, dtype=dtype
        )
    prepares = hasattr(hooks.plugin("quantizer", str(config.method)), "quantizer_prepare")
    return cost if prepares else cost + Cost({"loading": facts.parameters * BYTES[dtype]})


def described(config: QuantizationConfig, bits: PlannedBits) -> str:
    """One line of the plan."""
    group = f" in groups of {bits.assumed.group_size}" if bits.assumed.group_size else ""
    if bits.known is None:
        share = f"{config.target_bits:g} bits" if config.target_bits else f"{config.budget_mb:g} MB"
        what = f"bits by module, measured, within {share}{group}"
    elif len(set(bits.known.overrides.values())) > 1:
        counts: dict[int, int] = {}
        for each, _ in bits.known.overrides.values():
            counts[each] = counts.get(each, 0) + 1
        what = "bits by module: " + ", ".join(f"{count} of {each}" for each, count in sorted(counts.items()))
    else:
        width, size = next(iter(bits.known.overrides.values()), (bits.known.bits, bits.known.group_size))
        what = f"{width} bits" + (f" in groups of {size}" if size else "")
    return f"{what}; {config.method}, because {config.why_chosen}" if config.why_chosen else what


def _bits(config: QuantizationConfig, widths: frozenset[int], facts: ModelFacts, base_dir: Path | None) -> PlannedBits:
    if config.bit_plan is not None:
        from .bit_plan_file import read_with_method

        path = (base_dir or Path()) / Path(config.bit_plan).expanduser()
        plan, made_for = read_with_method(path, facts if facts.known else None)
        return PlannedBits(plan, plan, made_for)
    if config.bits == "auto":
        return PlannedBits(None, BitPlan(_nearest(config, widths), shared_group(config, facts)))
    plan = uniform_bits(config)
    return PlannedBits(plan, plan)


def _candidates(widths: frozenset[int]) -> list[int]:
    return sorted(widths & CANDIDATES)


def _nearest(config: QuantizationConfig, widths: frozenset[int]) -> int:
    """The least width that is no narrower than the target."""
    offered = _candidates(widths)
    if not offered:
        raise CompatibilityError(
            f'"{config.method}" has none of the widths that bits: auto chooses from',
            why=f"it has {', '.join(map(str, sorted(widths)))}; the choice is among {sorted(CANDIDATES)} and 16",
            fix="choose another method, or give one number of bits",
        )
    target = config.target_bits
    if target is not None and target < offered[0]:
        least = f"the narrowest that {config.method} has is {offered[0]} bits"
        raise ConfigError(
            [Problem("target_bits", f"{target:g} bits cannot be reached", least, f"raise it to {offered[0]} or more")]
        )
    return next((width for width in offered if target is not None and width >= target), 16 if target else offered[-1])


def _budget_problems(
    config: QuantizationConfig, hooks: PlanningHooks, facts: ModelFacts, narrowest: int, dtype: str
) -> list[Problem]:
    if config.budget_mb is None:
        return []
    driver, group = hooks.quantizer(str(config.method)), shared_group(config, facts)
    whole, least = (
        driver.quantizer_estimate(config=config, model=facts, bits=BitPlan(bits, group), dtype=dtype).disk / 1e6
        for bits in (16, narrowest)
    )
    if least <= config.budget_mb:
        return []
    other = whole - sum(math.prod(module.shape) for module in facts.linear()) * (int(dtype[-2:]) // 8) / 1e6
    why = f"with {narrowest} bits everywhere it takes {least:.2f}; embeddings and norms, which stay, are {other:.2f}"
    fix = f"raise it to {math.ceil(least * 100) / 100:g} or more, or take narrower widths or larger groups"
    return [Problem("budget_mb", f"the model cannot be held in {config.budget_mb:g} MB", why, fix)]


def _calibration_problems(quantization: QuantizationConfig, base_dir: Path | None, *, measured: bool) -> list[Problem]:
    if quantization.calibration is None:
        return []
    if not measured:
        why = f"{quantization.method} rounds weights without looking at data"
        return [Problem("calibration", "nothing is measured in this run", why, "leave it out")]
    if quantization.calibration.dataset is None:
        return []
    try:
        DatasetProcessor(quantization.calibration.dataset, base_dir=base_dir).check_first_rows()
    except DataArgumentsError as error:
        return [problem.at("calibration") for problem in error.problems]
    except DataError as error:
        return [Problem("calibration.dataset", error.what, error.why, error.fix)]
    return []


def _unread(name: str, quant_method: str) -> Problem:
    return Problem(
        "base_model",
        f'{name!r} is quantized already, by "{quant_method}", and no installed quantizer loads that',
        "how packed weights are read is a plugin's matter",
        "install the plugin for it (see the list of extras: hyperion-ft[bnb], [gptq], [torchao]), or start from the "
        "unquantized model",
    )
