"""Which module gets how many bits: the least loss that fits into a number of bytes. Torch-free."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.specs import QuantizerSpecs

from .sensitivity import Sensitivity

Sizes = Mapping[str, Mapping[int, int]]
"""Bytes on disk by module and bits, scales and zeros counted."""

UNQUANTIZED = 16
# A solver's answer is exact to about one in 10^9 of its objective's unit; the best plan costs this many units at most.
_RESOLUTION = 1e6

_SHARED_GROUPS = (128, 64, 32, 16)


def shared_group(config: QuantizationConfig, facts: ModelFacts) -> int:
    """Weights that share a scale where bits are shared out; 0 is the method's own choice.

    Where the user does not say, the largest of 128, 64, 32 and 16 that divides every linear module's inputs: with a
    group size that depended on what else is quantized, bytes and losses of single modules would not add up.
    """
    widths = {module.shape[1] for module in facts.linear()}
    if config.group_size or "group_size" not in config.understood or not widths:
        return config.group_size or 0
    return next((size for size in _SHARED_GROUPS if not any(width % size for width in widths)), 0)


def module_sizes(
    quantizer: QuantizerSpecs,
    config: QuantizationConfig,
    facts: ModelFacts,
    candidates: Collection[int],
    group_size: int,
    dtype: str,
) -> dict[str, dict[int, int]]:
    """Bytes of each linear module's weight at each of the candidates and at 16 bits: as it is, in `dtype`.

    What the quantizer's own estimate says when that module alone is quantized. A width at which a module takes no
    fewer bytes is left out: the quantizer leaves that module as it is.
    """

    def on_disk(plan: BitPlan) -> int:
        return quantizer.quantizer_estimate(config=config, model=facts, bits=plan, dtype=dtype).disk

    nothing = on_disk(BitPlan(UNQUANTIZED, 0))
    each = int(dtype[-2:]) // 8  # "float32", "bfloat16", "float16"
    sizes = {}
    for module in facts.linear():
        full = math.prod(module.shape) * each
        taken = {
            bits: full + on_disk(BitPlan(UNQUANTIZED, 0, {module.name: (bits, group_size)})) - nothing
            for bits in sorted(set(candidates) - {UNQUANTIZED})
        }
        sizes[module.name] = {bits: size for bits, size in taken.items() if size < full} | {UNQUANTIZED: full}
    return sizes


def unquantizable_bytes(
    quantizer: QuantizerSpecs, config: QuantizationConfig, facts: ModelFacts, sizes: Sizes, dtype: str
) -> int:
    """Bytes on disk of all that keeps its type: embeddings, norms, biases, the output head."""
    whole = quantizer.quantizer_estimate(config=config, model=facts, bits=BitPlan(UNQUANTIZED, 0), dtype=dtype)
    return whole.disk - sum(of[UNQUANTIZED] for of in sizes.values())


def budget_of(config: QuantizationConfig, sizes: Sizes, rest: int) -> int:
    """Bytes that the linear modules may take together.

    With `target_bits`: what they take with so many bits everywhere; between two widths on the straight line (3.5 bits
    take half of what 3 and 4 take together). With `budget_mb`: that many million bytes, less `rest`, what else the
    model takes.
    """
    if config.target_bits is None:
        assert config.budget_mb is not None
        return int(config.budget_mb * 1e6) - rest
    target, widths = config.target_bits, sorted(set().union(*sizes.values()))
    if target <= widths[0]:  # below it nothing fits, and `allocate` says so
        return int(_taken(sizes, widths[0]) * target / widths[0])
    low = max(bits for bits in widths if bits < target)
    high = min(bits for bits in widths if bits >= target)
    part = (target - low) / (high - low)
    return int((1 - part) * _taken(sizes, low) + part * _taken(sizes, high))


def check_budget(sizes: Sizes, budget: int) -> None:
    """Before anything is measured.

    Raises:
        CompatibilityError: the narrowest widths take more than `budget` bytes.
    """
    needed = sum(min(of.values()) for of in sizes.values())
    if needed > budget:
        raise CompatibilityError(
            f"the linear modules cannot be held in {max(budget, 0):,} bytes",
            why=f"with the fewest bits that the quantizer has for each they take {needed:,}",
            fix="raise target_bits or budget_mb, or choose a quantizer with narrower widths or larger groups",
        )


def allocate(sensitivity: Sensitivity, sizes: Sizes, budget: int) -> dict[str, int]:
    """Bits by module with the least sum of losses whose sizes together are within `budget` bytes.

    This is the multiple-choice knapsack problem (Sinha and Zoltners 1979), solved to the optimum as a mixed-integer
    linear program by HiGHS. The order of the arguments' modules does not matter.

    Args:
        sensitivity: with a loss for every module and width in `sizes`.

    Raises:
        CompatibilityError: the narrowest widths take more than `budget`.
    """
    check_budget(sizes, budget)
    options = {name: _worth_having(sizes[name], sensitivity.loss_increase[name]) for name in sorted(sizes)}
    least = {name: min(of, key=of.__getitem__) for name, of in options.items()}
    plan = _solved(options, sensitivity.loss_increase, least, budget)
    return {name: plan[name] for name in sizes}


def _taken(sizes: Sizes, bits: int) -> int:
    """By all modules at that width; a module that has not got it stays at the next one that it has."""
    return sum(of[min(width for width in of if width >= bits)] for of in sizes.values())


def _worth_having(size: Mapping[int, int], loss: Mapping[int, float]) -> dict[int, int]:
    """Sizes of the widths that are better than every smaller one."""
    kept: dict[int, int] = {}
    best = math.inf
    for bits in sorted(size, key=lambda bits: (size[bits], loss[bits], bits)):
        if loss[bits] < best:
            kept[bits], best = size[bits], loss[bits]
    return kept


def _solved(
    options: Mapping[str, Mapping[int, int]], loss: Mapping[str, Mapping[int, float]], least: Mapping[str, int],
    budget: int,
) -> dict[str, int]:  # fmt: skip
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    # What costs more than a plan that is known already is in no best plan. Without it, losses span fewer magnitudes.
    known = _greedy(options, loss, least, budget)
    bound = sum(loss[name][bits] for name, bits in known.items())
    chosen = [(name, bits) for name, of in options.items() for bits in of if loss[name][bits] <= bound]
    if bound == 0 or len(chosen) == len(options):
        return known
    rows = {name: row for row, name in enumerate(options)}
    unit = math.gcd(*(options[name][bits] for name, bits in chosen))
    size = np.array([options[name][bits] // unit for name, bits in chosen], dtype=float)
    cost = np.array([loss[name][bits] for name, bits in chosen])
    row, column = [rows[name] for name, _ in chosen], range(len(chosen))
    one_each = csr_array((np.ones(len(chosen)), (row, column)), shape=(len(rows), len(chosen)))
    with _output_of_c_to_error():
        answer = milp(
            cost * (_RESOLUTION / bound),
            integrality=np.ones(len(chosen)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(size[None]), -np.inf, budget // unit),
            ],
            options={"mip_rel_gap": 0},
        )
    if answer.x is None:
        raise RuntimeError(f"HiGHS found no plan, although there is one: {answer.message}")
    return {name: bits for (name, bits), taken in zip(chosen, answer.x, strict=True) if taken > 0.5}


@contextmanager
def _output_of_c_to_error() -> Iterator[None]:
    """HiGHS prints lines of its own whatever it is told, and standard output may be a JSON document."""
    libc = ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # what C still holds would else come out later, where it does not belong
        os.dup2(kept, 1)
        os.close(kept)


def _greedy(
    options: Mapping[str, Mapping[int, int]], loss: Mapping[str, Mapping[int, float]], least: Mapping[str, int],
    budget: int,
) -> dict[str, int]:  # fmt: skip
    """A good plan: from the narrowest widths upwards, the step that saves the most loss a byte first."""
    plan = dict(least)
    left = budget - sum(options[name][bits] for name, bits in plan.items())
    while True:
        steps = [
            ((loss[name][plan[name]] - loss[name][bits]) / (size - of[plan[name]]), name, bits)
            for name, of in options.items()
            for bits, size in of.items()
            if of[plan[name]] < size <= of[plan[name]] + left
        ]
        if not steps:
            return plan
        _, name, bits = max(steps)
        left -= options[name][bits] - options[name][plan[name]]
        plan[name] = bits
