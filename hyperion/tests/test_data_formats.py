"""Rows of every format to segments or messages, and the rows and columns that are refused."""

from __future__ import annotations

import json

import pytest
from hyperion_core.errors import DataError

from hyperion.data.formats import BadRow, detect_layout, row_converter
from hyperion.data.templates import InstructionTemplates

README = ("<instruction>\n{instruction}\n</instruction>", "<input>\n{input}\n</input>", "<output>\n{output}\n</output>")


def convert(row, *, templates=(None, None, None), system=None, format="auto", columns=None):
    layout = detect_layout(row, "data.jsonl", format=format, columns=columns or {})
    return row_converter(layout, InstructionTemplates.of(*templates), system)(row)


def parts(row, **options):
    return [(s["text"], s["supervised"]) for s in convert(row, **options)["segments"]]


def test_instruction_row_with_input_fills_all_three_blocks():
    prompt = "<instruction>\nadd\n</instruction>\n<input>\n1 2\n</input>\n<output>\n"
    assert parts({"instruction": "add", "input": "1 2", "output": "3"}, templates=README) == [
        (prompt, False),
        ("3\n</output>", True),
    ]


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_input_block_vanishes_without_input(extra):
    row = {"instruction": "go", "output": "ok", **extra}
    assert parts(row, templates=README)[0][0] == "<instruction>\ngo\n</instruction>\n<output>\n"


def test_default_templates():
    assert parts({"instruction": "I", "input": "X", "output": "O"}) == [
        ("Task:\nI\n\nInput:\nX\n\nAnswer:\n", False),
        ("O", True),
    ]


def test_braces_in_data_and_templates_mean_themselves():
    row = {"instruction": "{output} {0} %s", "input": "{{input}}", "output": "{instruction} \\1"}
    templates = ('{"q": "{instruction}"}', "{input}{}", "{a}{output}{b}")
    assert parts(row, templates=templates) == [
        ('{"q": "{output} {0} %s"}\n{{input}}{}\n{a}', False),
        ("{instruction} \\1{b}", True),
    ]


def test_completion_and_text():
    assert parts({"prompt": "2+2=", "completion": " 4"}) == [("2+2=", False), (" 4", True)]
    assert parts({"text": "all of it"}) == [("all of it", True)]


def test_sharegpt_spelling_becomes_messages_and_extra_keys_are_left():
    row = {"conversations": [{"from": "human", "value": "hi", "id": 3}, {"from": "gpt", "value": "yo"}], "id": 1}
    assert convert(row)["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_system_is_put_in_front_only_where_there_is_none():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    own = {"role": "system", "content": "mine"}
    assert convert({"messages": turns}, system="S")["messages"][0] == {"role": "system", "content": "S"}
    assert convert({"messages": [own, *turns]}, system="S")["messages"] == [own, *turns]


@pytest.mark.parametrize(
    ("row", "user"),
    [
        ({"instruction": "I", "input": "X", "output": "O"}, "I\nX"),
        ({"instruction": "I", "input": "", "output": "O"}, "I"),
        ({"prompt": "I", "completion": "O"}, "I"),
    ],
)
def test_chat_format_turns_other_rows_into_messages(row, user):
    assert convert(row, format="chat", system="S")["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "O"},
    ]


@pytest.mark.parametrize(
    ("found", "shape"),
    [
        (["instruction", "input", "output", "text"], "instruction"),  # alpaca, with its rendered copy
        (["prompt", "prompt_id", "messages"], "messages"),  # ultrachat
        (["text", "label"], "text"),
    ],
)
def test_detection_on_columns_of_real_datasets(found, shape):
    assert detect_layout(found, "d", columns={}).shape == shape


def test_columns_are_mapped_and_choose_among_formats():
    assert parts({"question": "Q", "answer": "A"}, columns={"prompt": "question", "completion": "answer"}) == [
        ("Q", False),
        ("A", True),
    ]
    layout = detect_layout(["messages", "prompt", "completion"], "d", columns={"prompt": "prompt"})
    assert layout.shape == "completion"
    # A column that was given another meaning is not also read by its own name.
    assert detect_layout(["text", "q"], "d", columns={"prompt": "q", "completion": "text"}).shape == "completion"


def test_unknown_columns_name_what_was_found_and_the_fix():
    with pytest.raises(DataError) as caught:
        detect_layout(["question", "answer"], "d.csv", columns={})
    assert "question, answer" in caught.value.why
    assert "columns: {instruction: question, output: answer}" in caught.value.fix


def test_ambiguous_columns_are_refused():
    with pytest.raises(DataError, match="several ways: messages, instruction") as caught:
        detect_layout(["messages", "instruction", "output"], "d", columns={})
    assert 'format: "chat"' in caught.value.fix


def test_mapped_column_that_is_not_there_gets_a_suggestion():
    with pytest.raises(DataError, match='no column "qestion"') as caught:
        detect_layout(["question", "answer"], "d", columns={"prompt": "qestion", "completion": "answer"})
    assert caught.value.fix == 'did you mean "question"?'


def test_format_that_the_columns_do_not_fit():
    with pytest.raises(DataError, match='does not fit format "completion"') as caught:
        detect_layout(["instruction", "output"], "d", format="completion", columns={})
    assert "prompt + completion" in caught.value.why


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "", "output": "b"}, '"instruction" is empty'),
        ({"instruction": "a", "output": None}, '"output" is missing'),
        ({"instruction": "a", "output": 42}, r'"output" is not a text but a number \(42\)'),
        ({"instruction": "a", "input": ["x"], "output": "b"}, '"input" is not a text but a list'),
        ({"text": "  "}, '"text" is empty'),
        ({"messages": "hi"}, '"messages" is not a list of messages'),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"messages": [{"text": "x"}]}, r"neither role nor from \(it has text\)"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r'"messages"\[1\].content is empty'),
        ({"messages": [USER, ANSWER, {"role": "user", "content": None}]}, r"\[2\].content is missing"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"f": 1}]}]}, "carries tool_calls, which would be lost"),
        ({"messages": [USER, "a"]}, "is not a message but a text"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, what):
    with pytest.raises(BadRow, match=what) as caught:
        convert(row)
    assert caught.value.fix


def test_blank_system_prompts_and_tool_results_are_kept():
    messages = [{"role": "system", "content": ""}, USER, {"role": "tool", "content": ""}, ANSWER]
    assert convert(json.loads(json.dumps({"messages": messages})))["messages"] == messages
