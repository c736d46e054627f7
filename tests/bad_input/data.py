"""Data that cannot be read, or not be learnt from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .case import ROWS, Case, Place

Arrange = Callable[[Place], list[str]]

CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
TASK = {"instruction": "Add 1 and 1.", "input": "", "output": "2"}


def file(content: str | bytes, name: str = "data.jsonl", **dataset: Any) -> Arrange:
    """Validate a config whose data is a file of this content."""

    def arrange(place: Place) -> list[str]:
        place.write(name, content)
        return ["validate", place.config(dataset={"dataset": name, "validation_split": 0, **dataset})]

    return arrange


def rows(found: Sequence[Any], **dataset: Any) -> Arrange:
    """Validate a config whose data are these rows."""
    return file("".join(json.dumps(row) + "\n" for row in found), **dataset)


def among(row: Mapping[str, Any]) -> Arrange:
    """Validate a config whose data has this row in the middle of good ones."""
    return rows([*ROWS[:4], row, *ROWS[4:]])


def chat(*messages: Any) -> Arrange:
    """Validate a config whose data has a conversation of these messages behind a good one."""
    return rows([CHAT, {"messages": list(messages)}])


def named(dataset: str, **options: Any) -> Arrange:
    """Validate a config with this `dataset`."""
    return lambda place: ["validate", place.config(dataset={"dataset": dataset, "validation_split": 0, **options})]


def trained(found: Sequence[Any], model: Callable[[Place], str] | None = None, **changes: Any) -> Arrange:
    """Train on these rows: what only the tokens show."""

    def arrange(place: Place) -> list[str]:
        place.rows(found)
        if model is not None:
            changes["base_model"] = model(place)
        config = place.config(dataset={"validation_split": 0}, **changes)
        return ["train", config, "--output_dir", "run"]

    return arrange


def template(text: str | None) -> Callable[[Place], str]:
    """The tiny model with another chat template, or with none."""

    def model(place: Place) -> str:
        for path in place.tiny_model.iterdir():
            if path.name != "chat_template.jinja":
                place.write(f"model/{path.name}", path.read_bytes())
        settings = json.loads((place.tiny_model / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        place.write("model/tokenizer_config.json", json.dumps(settings))
        if text is not None:
            place.write("model/chat_template.jinja", text)
        return "./model"

    return model


def _parquet(cut: int | None = None, **columns: Sequence[Any]) -> Arrange:
    def arrange(place: Place) -> list[str]:
        import pyarrow
        from pyarrow import parquet

        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(columns), sink)
        content = sink.getvalue().to_pybytes()
        return file(content[:cut], "data.parquet")(place)

    return arrange


def _a_package(inside: str) -> Arrange:
    """Validate a config whose data is this path in an installed package."""

    def arrange(place: Place) -> list[str]:
        installed = place.fake_dist("acme-data", {}, {"acme_data/__init__.py": ""})
        (installed / "acme_data/rows.jsonl").write_text(_jsonl(GOOD), encoding="utf-8")
        return named(f"package://acme_data/{inside}")(place)

    return arrange


def _a_folder_without_rows(place: Place) -> list[str]:
    place.write("corpus/notes.md", "# rows\n")
    return named("corpus")(place)


def _a_folder_of_several_kinds(place: Place) -> list[str]:
    place.rows(name="corpus/train.jsonl")
    place.write("corpus/train.csv", "prompt,completion\nWhy?,Because.\n")
    return named("corpus")(place)


def _a_folder_where_a_file_belongs(place: Place) -> list[str]:
    place.write("rows.jsonl/part", "")
    place.write("other.jsonl", "")
    return named("rows.jsonl")(place)


def _offline(place: Place) -> list[str]:
    config = place.config(dataset={"dataset": "owner/data", "validation_split": 0})
    return ["train", config, "--output_dir", "run"]


def _jsonl(*lines: str) -> str:
    return "".join(line + "\n" for line in lines)


GOOD = json.dumps(ROWS[0])
LATIN = "prompt,completion\nWhere?,At the café.\n".encode("latin-1")


def case(what: str, arrange: Arrange, *says: str) -> Case:
    return Case("data", what, arrange, says)


CASES: tuple[Case, ...] = (
    # Where it is.
    case("the file is not there", named("row.jsonl"), "there is no file or folder row.jsonl"),
    case("its folder is not there", named("no/such/rows.jsonl"), "there is no file or folder no/such/rows.jsonl"),
    case("a suffix that no rows have", file("x", "data.xlsx"), "data.xlsx is no file of rows"),
    case("a compressed file", file(gzip.compress(b"{}"), "data.jsonl.gz"), "data.jsonl.gz is no file of rows"),
    case("a folder without a file of rows", _a_folder_without_rows, "the folder corpus holds no rows"),
    case("a folder with files of several kinds", _a_folder_of_several_kinds, "several kinds"),
    case("a folder by the name of a file", _a_folder_where_a_file_belongs, "the folder rows.jsonl holds no rows"),
    case("a package that is not installed", named("package://no_such_package/rows.jsonl"), "not installed"),
    case("a file that the package lacks", _a_package("row.jsonl"), "there is no file", 'did you mean "rows.jsonl"?'),
    case("a path out of the package", _a_package("../../etc/passwd"), "its path would leave the package"),
    case("an address of the web", named("https://example.com/rows.jsonl"),
         "https://example.com/rows.jsonl is an address"),
    case("a split of a local file", named("rows.jsonl", split="test"), "dataset.split"),
    # The file.
    case("an empty file", file(""), "data.jsonl"),
    case("only blank lines", file("\n\n \n"), "data.jsonl"),
    case("a CSV file with a header alone", file("prompt,completion\n", "data.csv"), "data.csv"),
    case("an empty list of JSON", file("[]", "data.json"), "data.json"),
    case("a line that is not JSON", file(_jsonl(GOOD, GOOD[:-5], GOOD)), "data.jsonl:2 is not JSON"),
    case("a line that is no object", file(_jsonl(GOOD, '["Why?", "Because."]')), "data.jsonl:2 is not a JSON object"),
    case("one JSON object that holds the rows", file(json.dumps({"rows": list(ROWS)}, indent=1), "data.json"),
         "data.json"),
    case("a JSON list that breaks off", file("[" + GOOD + ",\n" + GOOD, "data.json"), "data.json:2 is not JSON"),
    case("JSON nested a hundred thousand deep", file(_jsonl(GOOD, "[" * 100_000)), "data.jsonl:2"),
    case("a number of ten thousand digits", file(_jsonl(GOOD, '{"prompt": ' + "9" * 10_000 + "}")), "data.jsonl:2"),
    case("text in Latin-1", file(LATIN, "data.csv"), "data.csv", "UTF-8"),
    case("text in UTF-16", file(_jsonl(GOOD).encode("utf-16")), "data.jsonl is not UTF-8 text", "UTF-16"),
    case("binary data under a text's name", file(b"\x00\x01\x02\x03" * 100, "data.txt"), "data.txt"),
    case("a gzip file under the name of JSON lines", file(gzip.compress(_jsonl(GOOD).encode())), "data.jsonl", "gzip"),
    case("a CSV row with a cell too many", file("prompt,completion\nWhy?,So.\nWhy?,So, and so.\n", "data.csv"),
         "data.csv:3 has 3 cells where the header has 2"),
    case("a quote that is never closed", file('prompt,completion\nWhy?,"So.\nWho?,I.\n', "data.csv"), "data.csv"),
    case("CSV with semicolons", file("prompt;completion\nWhy?;So.\n", "data.csv"), "separated by ';'", "commas"),
    case("CSV without a header", file("Why?,So.\nWho?,I.\n", "data.csv"), "data.csv has no columns"),
    case("a CSV header with a name twice", file("prompt,completion,prompt\nWhy?,So.,x\n", "data.csv"), "prompt"),
    case("a parquet file that breaks off", _parquet(-50, prompt=["Why?"], completion=["So."]),
         "data.parquet is not a readable parquet file"),
    case("parquet with other columns", _parquet(question=["Why?"], answer=["So."]), "data.parquet has no columns"),
    # Columns.
    case("columns that no format has", rows([{"question": "Why?", "answer": "So."}]), "question, answer"),
    case("a column's name is misspelt", rows([{"prompt": "Why?", "compleation": "So."}]), "completion"),
    case("columns of two formats", rows([{**TASK, **ROWS[0]}]), "can be read in several ways"),
    case("a format that the columns do not fit", rows(ROWS, format="instruction"), 'does not fit format "instruction"'),
    case("`columns` names one that is not there", rows(ROWS, columns={"prompt": "promt", "completion": "completion"}),
         'no column "promt"', "prompt"),
    case("`columns` names a field that no row has", rows(ROWS, columns={"promtp": "prompt"}), "columns.promtp"),
    case("a template without its field", rows([TASK], output_template="Answer: {answer}"), "output_template"),
    case("a template for rows that use none", rows(ROWS, instruction_template="{instruction}!"),
         "instruction_template"),
    case("a system message for rows that have none", rows(ROWS, system="Be brief."), "dataset.system"),
    case("more rows to hold out than there are", rows(ROWS, validation_split=10), "too few rows"),
    case("more rows to hold out than sample_limit leaves", rows(ROWS, sample_limit=3, validation_split=3),
         "validation_split"),
    # Rows.
    case("an answer is missing", among({"prompt": "Why?"}), "data.jsonl:5", '"completion" is missing'),
    case("an answer is null", among({"prompt": "Why?", "completion": None}), "data.jsonl:5"),
    case("an answer is blank", among({"prompt": "Why?", "completion": " \n"}), "data.jsonl:5", "empty"),
    case("every answer is empty", rows([{**row, "completion": ""} for row in ROWS]), "data.jsonl:1", "empty"),
    case("an answer is a number", among({"prompt": "1 + 1?", "completion": 2}), "data.jsonl:5", "a number (2)"),
    case("an answer is a list", among({"prompt": "Why?", "completion": ["So."]}), "data.jsonl:5", "a list"),
    case("half a surrogate pair", among({"prompt": "Why?", "completion": "So \ud83d."}), "data.jsonl:5"),
    case("messages are a text", rows([CHAT, {"messages": "Why? Because."}]), "data.jsonl:2", "a list of messages"),
    case("messages are an empty list", chat(), "data.jsonl:2", "no assistant turn"),
    case("a message is a text", chat("Why?", "So."), "data.jsonl:2", "messages\"[0] is not a message"),
    case("a role that no model knows", chat({"role": "bot", "content": "So."}), "data.jsonl:2", "'bot'"),
    case("no assistant turn", chat({"role": "user", "content": "Why?"}), "data.jsonl:2", "no assistant turn"),
    case("a turn without content", chat({"role": "user", "content": "Why?"}, {"role": "assistant", "content": None}),
         "data.jsonl:2", "content"),
    case("tool calls in a message", chat({"role": "user", "content": "Why?"},
         {"role": "assistant", "content": "", "tool_calls": [{"name": "ask"}]}), "data.jsonl:2", "tool_calls"),
    # What only the tokens show.
    case("chat rows for a model without a chat template", trained([CHAT] * 4, template(None)), "no chat template"),
    case("a chat template that breaks off", trained([CHAT] * 4, template("{% for m in messages %}")),
         "not valid Jinja"),
    case("a chat template that refuses the rows",
         trained([CHAT] * 4, template("{{ raise_exception('no user turn') }}")),
         "the chat template refuses", "no user turn"),
    case("prompts so long that no answer is left",
         trained([{"prompt": f"Why {n}? " * 40, "completion": "So."} for n in range(4)], training={"max_length": 64}),
         "max_length 64 removes the answers of", "max_length"),
    case("a hub dataset, and no network", _offline, "the dataset owner/data cannot be loaded"),
)  # fmt: skip
