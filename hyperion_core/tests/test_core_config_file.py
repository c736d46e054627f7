"""Config files: every fault has file:line, and no file can do harm."""

from __future__ import annotations

import json
import os

import pytest
from hyperion_core.config_file import read_config_file
from hyperion_core.errors import ConfigError, Problem


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "run.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path) -> Problem:
    with pytest.raises(ConfigError) as caught:
        read_config_file(path)
    (problem,) = caught.value.problems
    return problem


def line(path, number: int) -> str:
    return f"{path}:{number}"


def test_data_and_lines(file):
    read = read_config_file(file("a: 1\nb:\n  c: [x, y]\n\n  d:\n  - e: 2\n"))
    assert read.data == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 2}]}}
    assert read.lines == {
        "": 1, "a": 1, "b": 2, "b.c": 3, "b.c.0": 3, "b.c.1": 3, "b.d": 5, "b.d.0": 6, "b.d.0.e": 6
    }  # fmt: skip


def test_problems_are_placed_and_put_in_the_order_of_the_file(file):
    path = file("a: 1\nb:\n  c: 2\n")
    problems = [Problem("b.c.deeper", "third"), Problem("zebra", "first"), Problem("b.missing", "second")]
    placed = read_config_file(path).located(problems)
    assert [(problem.what, problem.source) for problem in placed] == [
        ("first", line(path, 1)),
        ("second", line(path, 2)),
        ("third", line(path, 3)),
    ]


@pytest.mark.parametrize(
    "text, value",
    [("2e-4", 2e-4), ("1E5", 1e5), ("-3.5e+2", -350.0), (".5e1", 5.0), ("1_0e2", 1000.0), ("0.1", 0.1), ("8", 8),
     ("e5", "e5"), ("2e", "2e"), ("1e5x", "1e5x"), ("'2e-4'", "2e-4")],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(file, text, value):
    read = read_config_file(file(f"rate: {text}")).data["rate"]
    assert read == value and type(read) is type(value)


def test_json_with_tabs_and_every_character(file):
    data = {"a": {"b": [1, 2.5e-4, True, None]}, "smile": "😀", "c": 'tab\there "quoted" / \\'}
    text = json.dumps(data, indent="\t")
    assert "\\ud83d\\ude00" in text and "\n\t\t" in text
    read = read_config_file(file(text, "run.json"))
    assert read.data == data
    assert read.lines["a.b"] == 3


def test_a_byte_order_mark_is_no_part_of_the_first_key(file):
    assert read_config_file(file(b"\xef\xbb\xbfa: 1")).data == {"a": 1}


@pytest.mark.parametrize(
    "text, number, what",
    [
        ("a: 1\nb: 2\na: 3", 3, 'the key "a" stands twice'),
        ("x:\n  r: 1\n  r: 2", 3, 'the key "r" stands twice'),
        ('{"a": 1,\n "a": 2}', 2, 'the key "a" stands twice'),
        ("a: 1\n8: x", 2, "the key 8 is not a word"),
        ("a: 1\ntrue: x", 2, "the key true is not a word"),
        ("a: 1\n? [x, y]\n: 2", 2, "a key is not a word"),
        ("", 1, "the file is empty"),
        ("# only a comment", 1, "the file is empty"),
        ("- a\n- b", 1, "the file holds no mapping of keys to values"),
        ("word", 1, "the file holds no mapping of keys to values"),
        ("a: 1\nb: [1, 2", 2, "the file is not valid YAML"),
        ("a: 1\n\tb: 2", 2, "the file is not valid YAML"),
        ("a: 1\n---\nb: 2", 2, "the file is not valid YAML"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []", 2, "the file is not valid YAML"),
        ("a: 1\nb: " + "9" * 5000, 2, "the file is not valid YAML"),
        ('{"a": 1,\n "b": "\\ud83d"}', 2, "the file is not valid YAML"),
        ("a: *nobody", 1, "the file is not valid YAML"),
        ("a: \x00", 1, "the file is not valid YAML"),
        ("a: " + "[" * 3000, 1, "the file is nested too deep"),
    ],
)
def test_faults_have_their_line_and_a_way_out(file, text, number, what):
    path = file(text)
    problem = refusal(path)
    assert (problem.source, problem.what) == (line(path, number), what)
    assert problem.fix


def test_a_file_that_unfolds_without_end_is_refused_at_once(file):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert refusal(file(bomb)).what == "the file holds too much"
    assert refusal(file("a: &a\n  b: *a")).what == "the file unfolds without end"
    assert refusal(file("a: &a [*a]")).what == "the file unfolds without end"


def test_honest_aliases_are_read(file):
    assert read_config_file(file("a: &x {r: 1}\nb: *x")).data == {"a": {"r": 1}, "b": {"r": 1}}


def test_not_utf8(file):
    problem = refusal(file("name: café".encode("latin-1")))
    assert problem.what == "the file is not UTF-8 text" and problem.fix == "save it as UTF-8"


def test_a_missing_file_with_a_neighbour_of_nearly_that_name(file):
    path = file("a: 1", "train.yaml")
    assert refusal(path.with_name("trian.yaml")).fix == f"did you mean {path}?"
    assert refusal(path.parent / "zzzzzz").fix == "give the path of a YAML or JSON file"
    assert refusal(path.parent / "no" / "folder.yaml").what == "there is no such file"


def test_a_folder_or_a_locked_file_cannot_be_read(file, tmp_path):
    assert refusal(tmp_path).what == "the file cannot be read"
    path = file("a: 1")
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        assert refusal(path).what == "the file cannot be read"
