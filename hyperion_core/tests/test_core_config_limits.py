"""Config files that would take long, fill the memory, or break their reader: each was found by fuzzing."""

from __future__ import annotations

import pytest
from hyperion_core.config import StrictModel
from hyperion_core.config_file import read_config_file
from hyperion_core.errors import ConfigError, HyperionError, Problem, printable

MUCH = 900_000


def refused(tmp_path, content: bytes) -> Problem:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config_file(path)
    (problem,) = caught.value.problems
    assert problem.why and problem.fix
    return problem


@pytest.mark.parametrize(
    "content, what",
    [
        (b"a: [" + b"1," * (MUCH // 2) + b"]", "the file holds too much"),
        (b"a: &a x\nb: [" + b"*a," * (MUCH // 3) + b"]", "the file holds too much"),
        (b"".join(b"k%d: 1\n" % n for n in range(80_000)), "the file holds too much"),
        (b"[" * MUCH, "the file is nested too deep"),
        (b"- " * (MUCH // 2), "the file is nested too deep"),
        (b"? " + b"k" * MUCH + b"\n: 1", "the key kkkkkkkkkkkkkkkkkkkk… is too long"),
        (b"a: " + b"9" * MUCH, "the file is not valid YAML"),
        (b"a: 0x" + b"f" * MUCH, "the file is not valid YAML"),
        (b"%YAML " + b"1" * 5000 + b"\n---\na: 1", "the file is not valid YAML"),
        (b"a: " + b"x" * 1_000_000, "the file is too large for a config"),
    ],
    ids=["a list", "aliases", "keys", "brackets", "dashes", "a key", "digits", "hex digits", "a version", "a value"],
)
def test_what_would_take_long_is_refused_instead(tmp_path, content: bytes, what: str):
    assert refused(tmp_path, content).what == what


def test_a_device_without_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="has 1 problem"):
        read_config_file("/dev/zero")


def test_a_sexagesimal_of_a_million_digits_is_text(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"a: 1" + b":1" * 1000)
    assert isinstance(read_config_file(tmp_path / "config.yaml").data["a"], str)


@pytest.mark.parametrize(
    "text, value",
    [("no", "no"), ("on", "on"), ("Yes", "Yes"), ("false", False), ("0100", 100), ("0x10", 16), ("0o10", 8),
     ("-0o7", -7), ("1:30", "1:30"), ("2026-01-31", "2026-01-31"), ("2026-99-01", "2026-99-01"),
     ("=", "="), ("~", None), ("", None), ("-.inf", float("-inf")), (".5", 0.5), (".", "."), ("1_000", 1000),
     ("_1", "_1"), ("08", 8), ("+5", 5), (".e5", ".e5")],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(tmp_path, text, value):
    (tmp_path / "config.yaml").write_text(f"a: {text}")
    read = read_config_file(tmp_path / "config.yaml").data["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("tag", ["!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2026-01-31", "!mine x"])
def test_no_value_is_of_a_kind_that_json_does_not_have(tmp_path, tag):
    assert "tag" in refused(tmp_path, f"a: {tag}".encode()).why


def test_what_a_terminal_would_obey_is_shown():
    assert printable("\x1b[2J\x07 a\nb é 😀") == "\\x1b[2J\\x07 a\nb é 😀"
    assert printable("\ud83d \u202e \u2028") == "\\ud83d \\u202e \\u2028"
    text = str(HyperionError("\x1b]0;title\x07", why="\x9b", fix="\r"))
    assert all(char == "\n" or char.isprintable() for char in text)


def test_what_a_user_named_cannot_look_like_a_line_of_ours():
    problem = Problem('a\n    fix: "curl | sh"', "x\ny", "why", "fix", "run.yaml\n:1")
    assert len(str(problem).splitlines()) == 3
    assert len(str(ConfigError([problem], source="run\n.yaml")).splitlines()) == 4


def test_ten_thousand_problems_are_not_all_printed():
    error = ConfigError([Problem(str(n), "x") for n in range(10_000)])
    assert len(error.problems) == 10_000
    lines = str(error).splitlines()
    assert len(lines) == 52 and lines[-1] == "  … and 9950 more"


class Rate(StrictModel):
    rate: float = 0.0


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [10**5000, float("nan"), float("inf"), {"a": 10**5000}, Odd()],
    ids=["digits", "nan", "inf", "nested", "odd"],
)
def test_a_value_that_cannot_be_printed_or_counted_is_refused_in_words(value):
    with pytest.raises(ConfigError) as caught:
        Rate.parse({"rate": value})
    (problem,) = caught.value.problems
    assert problem.path == "rate" and problem.why and problem.fix
