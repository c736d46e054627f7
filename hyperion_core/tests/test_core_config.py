"""Strict models: everything that is wrong is said at once, in the user's words, with the way out."""

from __future__ import annotations

from typing import ClassVar, Literal, Optional, Union

import pytest
from hyperion_core.config import (
    AdapterConfig,
    PluginConfig,
    QuantizationConfig,
    StrictModel,
    problems_of,
    raise_problems,
)
from hyperion_core.errors import ConfigError, Problem
from pydantic import Field, PositiveInt, ValidationError, field_validator
from pydantic_core import PydanticCustomError


class Inner(StrictModel):
    alpha: int = 1
    rate: float = 0.5
    targets: Union[str, list[str], None] = None  # noqa: UP007 - the old spelling is read too
    amount: PositiveInt | float = Field(1)

    @classmethod
    def contradictions(cls, data):
        if data.get("alpha", 1) == data.get("rate", 0.5):
            return [Problem("rate", "rate equals alpha", "nothing would move", "give another")]
        return []


class Outer(StrictModel):
    name: str
    mode: Literal["fast", "slow"] = "slow"
    inner: Inner = Inner()
    many: list[Inner] = Field(default_factory=list)
    by_name: dict[str, Inner] = Field(default_factory=dict)
    either: Optional[Union[str, Inner]] = None  # noqa: UP007, UP045


def problems(data, model=Outer) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        model.parse(data)
    return {problem.path: problem for problem in caught.value.problems}


def test_everything_is_reported_at_once():
    found = problems(
        {
            "nmae": "x",
            "mode": "quick",
            "inner": {"alhpa": 1, "rate": "high"},
            "many": [{}, {"alpha": 1, "rate": 1}],
            "by_name": {"q": {"rat": 1}},
        }
    )
    assert set(found) == {"nmae", "name", "mode", "inner.alhpa", "inner.rate", "many.1.rate", "by_name.q.rat"}
    assert found["nmae"].fix == 'did you mean "name"?'
    assert found["inner.alhpa"].what == 'unknown key "alhpa"' and found["inner.alhpa"].fix == 'did you mean "alpha"?'
    assert found["by_name.q.rat"].fix == 'did you mean "rate"?'
    assert found["name"].what == '"name" is missing' and found["name"].fix == "add it"
    assert found["mode"].what == "'quick' is refused" and "fast, slow" in found["mode"].why
    assert found["inner.rate"].what == "'high' is refused" and found["inner.rate"].why == "a number is wanted"
    assert found["many.1.rate"] == Problem("many.1.rate", "rate equals alpha", "nothing would move", "give another")


def test_a_contradiction_is_reported_beside_field_errors_of_its_own_model():
    found = problems({"alpha": 2, "rate": 2, "targets": 7}, Inner)
    assert set(found) == {"rate", "targets"}


def test_a_contradiction_about_an_unknown_key_explains_it_alone():
    class Renamed(StrictModel):
        rank: int = 1

        @classmethod
        def contradictions(cls, data):
            return [Problem("r", "r is called rank here", fix="write rank")] if "r" in data else []

    assert problems({"r": 1}, Renamed)["r"].what == "r is called rank here"
    with pytest.raises(ConfigError) as caught:
        Renamed(r=1, s=2)
    assert [problem.path for problem in caught.value.problems] == ["s", "r"]


@pytest.mark.parametrize("value", ["8", 8.0, True, None, [8]])
def test_types_are_not_guessed(value):
    assert set(problems({"alpha": value}, Inner)) == {"alpha"}


def test_a_union_gives_one_problem_with_all_the_reasons_and_a_clean_path():
    (problem,) = problems({"targets": 7}, Inner).values()
    assert problem.path == "targets" and problem.why == "text is wanted; or a list is wanted"
    (problem,) = problems({"amount": "x"}, Inner).values()
    assert problem.path == "amount" and "; or " in problem.why
    found = problems({"name": "x", "either": {"alhpa": 2}})
    assert found["either.alhpa"].fix == 'did you mean "alpha"?'


def test_a_long_value_is_cut():
    (problem,) = problems({"alpha": "x" * 500}, Inner).values()
    assert len(problem.what) < 100 and problem.what.endswith("... is refused")


def test_building_and_parsing_give_the_same_words_and_nesting_hides_nothing():
    with pytest.raises(ConfigError) as built:
        Outer(inner={"alhpa": 1}, mode="quick")
    with pytest.raises(ConfigError) as parsed:
        Outer.parse({"inner": {"alhpa": 1}, "mode": "quick"})
    assert built.value.problems == parsed.value.problems
    assert {problem.path for problem in built.value.problems} == {"inner.alhpa", "mode", "name"}
    assert isinstance(built.value.__cause__, ValidationError)
    assert built.value.source == "Outer"
    with pytest.raises(ConfigError, match=r"run\.yaml has 1 problem:"):
        Outer.parse({}, source="run.yaml")


def test_pydantics_own_door_raises_pydantics_own_error():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"alhpa": 1}})
    assert {problem.path for problem in problems_of(caught.value)} == {"inner.alhpa", "name"}


def test_what_is_no_mapping_is_refused():
    assert problems(["a"])[""].why == "a mapping of keys to values is wanted"


class Validating(StrictModel):
    a: int = 0
    b: str = ""

    @field_validator("a")
    @classmethod
    def _refuse(cls, value: int) -> int:
        if value == 1:
            raise ValueError("One is not enough")
        if value == 2:
            raise AssertionError("Two is not enough")
        if value == 3:
            raise PydanticCustomError("their_own", "no {what} here", {"what": "{three}"})
        if value == 4:
            raise_problems([Problem("deep.er", "four", "why", "fix")])
        if value == 5:
            raise_problems([])
        return value


@pytest.mark.parametrize("value, why", [(1, "one is not enough"), (2, "two is not enough"), (3, "no {three} here")])
def test_a_plugins_own_validator_is_heard_beside_the_other_errors(value, why):
    found = problems({"a": value, "b": 1}, Validating)
    assert set(found) == {"a", "b"} and found["a"].why == why


def test_a_validator_may_give_problems_with_paths_below_its_field():
    with pytest.raises(ValidationError) as caught:
        Validating.model_validate({"a": 4})
    assert problems_of(caught.value) == [Problem("a.deep.er", "four", "why", "fix")]
    assert Validating(a=5).a == 5


def test_models_are_frozen_and_remember_what_was_given():
    inner = Inner(alpha=3)
    with pytest.raises(ValidationError):
        inner.alpha = 4
    assert inner.given() == {"alpha": 3}
    assert Inner.allowed_keys() == ["alpha", "rate", "targets", "amount"]
    assert Inner.parse(inner.model_dump()) == inner


def test_a_plugins_config_names_its_plugin():
    class Mine(AdapterConfig):
        type: str = "mine"
        r: int = 8

    assert isinstance(Mine(), PluginConfig) and Mine().type == "mine"
    assert Mine(type="acme:mine").type == "acme:mine"


def test_quantization_has_what_every_method_has():
    config = QuantizationConfig(bits=4, group_size=128, double_quant=True)
    assert (config.bits, config.group_size, config.double_quant, config.method) == (4, 128, True, None)
    assert set(problems({"bits": 0, "group_size": -1, "methd": "x"}, QuantizationConfig)) == {
        "bits", "group_size", "methd"
    }  # fmt: skip
    assert "bits" in problems({"bits": 17}, QuantizationConfig)


def test_a_method_says_which_shared_options_mean_nothing_to_it():
    class Flat(QuantizationConfig):
        understood: ClassVar[frozenset[str]] = frozenset({"method", "bits"})

    (problem,) = problems({"group_size": 64, "double_quant": None, "bits": 8}, Flat).values()
    assert problem.path == "group_size" and problem.fix == "leave it out"
    assert Flat(bits=8, group_size=None).bits == 8
