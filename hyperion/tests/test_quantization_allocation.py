"""Sharing out bits: exactly the least loss that the bytes allow, whatever the order of the modules."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from typing import Any

import pytest
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan, Cost, ModelFacts, ModuleFact
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperion.plugin_templates.quantizer.plugin import ChangemeConfig, ChangemeQuantizer
from hyperion.quantization.allocation import allocate, budget_of, module_sizes, unquantizable_bytes
from hyperion.quantization.sensitivity import Sensitivity

FACTS = ModelFacts(
    source="here",
    model_type="llama",
    modules=(
        ModuleFact("model.embed_tokens", "embedding", (100, 64)),
        ModuleFact("model.layers.0.mlp.up_proj", "linear", (96, 64)),
        ModuleFact("model.layers.0.mlp.down_proj", "linear", (64, 96), bias=True),
        ModuleFact("lm_head", "linear", (100, 64)),
    ),
)


class Driver:
    """The template's quantizer, called as a run's hooks are: by keyword."""

    def quantizer_estimate(self, config: Any, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
        return ChangemeQuantizer().quantizer_estimate(config, model, bits, dtype)


def config(**options: Any) -> ChangemeConfig:
    return ChangemeConfig(bits="auto", group_size=32, **(options or {"target_bits": 3}))


def sizes(**options: Any) -> dict[str, dict[int, int]]:
    return module_sizes(Driver(), config(**options), FACTS, {2, 3, 4, 8}, 32, "bfloat16")


widths = st.lists(st.sampled_from([2, 3, 4, 8, 16]), min_size=1, max_size=4, unique=True)
losses = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.integers(0, 3).map(float))  # with ties


@st.composite
def instances(draw: Any) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, int]], int]:
    loss: dict[str, dict[int, float]] = {}
    size: dict[str, dict[int, int]] = {}
    for number in range(draw(st.integers(1, 6))):
        chosen = draw(widths)
        loss[f"m{number}"] = {bits: draw(losses) for bits in chosen}
        size[f"m{number}"] = {bits: draw(st.integers(1, 10_000)) for bits in chosen}
    least = sum(min(of.values()) for of in size.values())
    most = sum(max(of.values()) for of in size.values())
    return loss, size, draw(st.integers(least, most))


@settings(max_examples=200, deadline=None)
@given(instances())
def test_no_other_plan_within_the_budget_costs_less(instance: Any) -> None:
    loss, size, budget = instance

    def cost(plan: Any) -> float:
        return math.fsum(loss[name][bits] for name, bits in zip(loss, plan, strict=True))

    plans = (plan for plan in itertools.product(*(size[name] for name in loss))
             if sum(size[name][bits] for name, bits in zip(loss, plan, strict=True)) <= budget)  # fmt: skip
    best = min(map(cost, plans))
    found = allocate(Sensitivity(loss, 1), size, budget)
    assert list(found) == list(size)
    assert sum(size[name][bits] for name, bits in found.items()) <= budget
    assert cost(found.values()) == pytest.approx(best, rel=1e-9, abs=0)


def test_as_many_modules_as_a_large_model_has_in_any_order() -> None:
    draw = random.Random(0)
    names = [f"model.layers.{layer}.{kind}" for layer in range(80) for kind in "qkvogud"]
    weights = {name: draw.choice([2**24, 2**23, 2**26]) for name in names}
    size = {name: {b: weights[name] * (2 * b + 1) // 16 for b in (2, 3, 4, 8, 16)} for name in names}
    scale = {name: 10 ** draw.uniform(-5, 0) for name in names}
    loss = {name: {b: scale[name] * 4.0**-b * draw.uniform(0.5, 2) if b < 16 else 0.0 for b in (2, 3, 4, 8, 16)}
            for name in names}  # fmt: skip
    budget = sum(of[3] + of[4] for of in size.values()) // 2
    found = allocate(Sensitivity(loss, 1), size, budget)
    assert sum(size[name][bits] for name, bits in found.items()) <= budget
    draw.shuffle(names)
    again = allocate(Sensitivity({n: loss[n] for n in names}, 1), {n: size[n] for n in names}, budget)
    assert again == found
    uniform = [sum(of[b] for of in loss.values()) for b in (3, 4)]
    assert sum(loss[name][bits] for name, bits in found.items()) < uniform[1]


def test_scales_are_counted_and_what_is_not_quantized_is_none_of_it() -> None:
    found = sizes()
    assert list(found) == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"], "not the head"
    weights = 96 * 64
    assert found["model.layers.0.mlp.up_proj"] == {
        2: weights * 2 // 8 + weights // 32 * 3,
        3: weights * 3 // 8 + weights // 32 * 3,
        4: weights * 4 // 8 + weights // 32 * 3,
        8: weights * 8 // 8 + weights // 32 * 3,
        16: weights * 2,
    }
    rest = unquantizable_bytes(Driver(), config(target_bits=3), FACTS, found, "bfloat16")
    assert rest == 2 * (100 * 64 + 100 * 64 + 64), "embedding, head and bias"


def test_a_target_is_what_so_many_bits_everywhere_would_take() -> None:
    found = sizes()
    uniform = {b: sum(of[b] for of in found.values()) for b in (2, 3, 4, 8, 16)}
    asked = {t: budget_of(config(target_bits=t), found, 0) for t in (2, 2.5, 3, 3.5, 4, 6, 16)}
    assert asked[2] == uniform[2] and asked[3] == uniform[3] and asked[4] == uniform[4] and asked[16] == uniform[16]
    assert asked[2.5] == (uniform[2] + uniform[3]) // 2 and asked[6] == (uniform[4] + uniform[8]) // 2
    assert budget_of(config(budget_mb=0.05), found, rest=20_000) == 30_000


@pytest.mark.parametrize("asked", [{"target_bits": 1.5}, {"budget_mb": 0.001}])
def test_a_budget_below_the_least_is_refused_with_what_the_least_is(asked: dict[str, float]) -> None:
    found = sizes()
    loss = {name: dict.fromkeys(of, 1.0) for name, of in found.items()}
    budget = budget_of(config(**asked), found, rest=25_664)
    with pytest.raises(CompatibilityError) as caught:
        allocate(Sensitivity(loss, 1), found, budget)
    assert f"{sum(of[2] for of in found.values()):,}" in str(caught.value) and "target_bits" in caught.value.fix


def test_a_width_that_saves_nothing_is_not_offered() -> None:
    class Leaves(Driver):
        """Cannot quantize down_proj: it stays as it is."""

        def quantizer_estimate(self, config: Any, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
            kept = {**bits.overrides, "*.down_proj": (16, 0)}
            if "model.layers.0.mlp.down_proj" in kept:
                kept["model.layers.0.mlp.down_proj"] = (16, 0)
            return super().quantizer_estimate(config, model, BitPlan(bits.bits, bits.group_size, kept), dtype)

    found = module_sizes(Leaves(), config(target_bits=2), FACTS, {2, 4}, 32, "bfloat16")
    assert set(found["model.layers.0.mlp.down_proj"]) == {16} and set(found["model.layers.0.mlp.up_proj"]) == {2, 4, 16}
    least = budget_of(config(target_bits=2), found, 0)
    assert least == found["model.layers.0.mlp.down_proj"][16] + found["model.layers.0.mlp.up_proj"][2]


def test_nothing_that_the_solver_prints_gets_into_standard_output() -> None:
    """It would break what `--json` prints. HiGHS prints, for some problems, from C."""
    script = """
import ctypes, scipy.optimize
from hyperion.quantization.allocation import allocate
from hyperion.quantization.sensitivity import Sensitivity
solve, libc = scipy.optimize.milp, ctypes.CDLL(None)
def milp(*args, **named):
    libc.puts(b"a line of the solver")
    return solve(*args, **named)
scipy.optimize.milp = milp
sizes = {name: {2: 2, 3: 3, 16: 16} for name in "abc"}
print(len(allocate(Sensitivity({name: {2: 5.0, 3: 1.0, 16: 0.0} for name in "abc"}, 1), sizes, 24)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n" and "a line of the solver" in done.stderr
