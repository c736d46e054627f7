"""Errors are messages to a person: what, why, fix."""

from __future__ import annotations

import pytest
from hyperion_core import errors
from hyperion_core.errors import ConfigError, HyperionError, Problem
from hyperion_core.suggest import closest, did_you_mean


def test_an_error_renders_what_why_and_fix():
    error = HyperionError("the thing failed", why="it was late", fix="python -m pip install sleep\nand try again")
    assert str(error) == ("the thing failed\n  why: it was late\n  fix: python -m pip install sleep\n  and try again")
    assert str(HyperionError("short")) == "short"
    assert error.exit_code == 2


def test_a_config_error_lists_every_problem_with_its_place():
    problems = [
        Problem("adapter.r", "0 is refused", "it must be positive", source="run.yaml:3"),
        Problem("", "nothing here", fix="write something"),
    ]
    assert str(ConfigError(iter(problems), source="run.yaml")) == (
        "run.yaml has 2 problems:\n"
        "  run.yaml:3: adapter.r: 0 is refused\n"
        "    why: it must be positive\n"
        "  nothing here\n"
        "    fix: write something"
    )
    assert str(ConfigError(problems[:1])).startswith("the config has 1 problem:\n")


def test_a_problem_can_be_moved_below_another_key():
    assert Problem("r", "x").at("adapter").path == "adapter.r"
    assert Problem("", "x").at("adapter").path == "adapter"
    assert Problem("r", "x").at("").path == "r"


def test_all_errors_are_one_family_so_that_the_command_line_catches_them():
    mine = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(mine) > 10
    assert all(issubclass(error, HyperionError) and error.__doc__ for error in mine)


@pytest.mark.parametrize(
    "name, allowed, fix",
    [
        ("consine", ["cosine", "linear"], 'did you mean "cosine"?'),
        ("LORA", ["lora"], 'did you mean "lora"?'),
        ("loraconfig", ["LoraConfig", "IA3Config"], 'did you mean "LoraConfig"?'),
        ("zzz", ["b", "a"], "allowed: a, b"),
        ("zzz", [f"{n:02}" for n in range(15)], "allowed: " + ", ".join(f"{n:02}" for n in range(12)) + " and 3 more"),
        ("zzz", [], ""),
    ],
)
def test_did_you_mean(name, allowed, fix):
    assert did_you_mean(name, allowed) == fix


def test_nothing_is_suggested_when_nothing_is_close():
    assert closest("zzz", ["lora", "ia3"]) is None
