"""Whatever stands in a file or in rows becomes a dataset, or an error of ours; and what is learnt of good rows.

The examples are the same in every run.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from byte_tokenizer import sft
from hyperion_core.errors import HyperionError
from hyperion_core.testing.tiny import END, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperion.data import DatasetProcessor
from hyperion.data.resolution import SUFFIXES
from hyperion.data.tokenization import TokenReport, tokenize_rows, trainable

pytestmark = pytest.mark.no_cover

IGNORED = -100
NAMES = (
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "messages",
    "conversations",
    "role",
    "content",
)

# Surrogates too: json has them, and no file or tokenizer takes them.
any_text = st.text(max_size=8) | st.sampled_from(
    ["", " ", "\n", "\x00", "\ud83d", "é", "👍", END, "{output}", "\u2028"]
)
leaf = st.none() | st.booleans() | st.integers() | st.integers(10**30, 10**40) | st.floats() | any_text
any_value = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=8
)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
mostly_words = st.integers(0, 15).flatmap(
    lambda n: words if n > 1 else any_text | leaf if n else st.sampled_from(["a\ud83d", "\udc4d\ud83d", "\x00", END])
)
role = st.integers(0, 15).flatmap(
    lambda n: (
        st.sampled_from(["user", "assistant", "human", "gpt"]) if n else st.sampled_from(["tool", "bot", ""]) | leaf
    )
)
message = st.fixed_dictionaries({"role": role, "content": mostly_words})
conversation = st.lists(message, min_size=1, max_size=4)
any_row = st.dictionaries(st.sampled_from(NAMES) | any_text, any_value | any_text | conversation, max_size=4)
kinds_of_row = (
    st.fixed_dictionaries({"prompt": mostly_words, "completion": mostly_words}, optional={"text": any_value}),
    st.fixed_dictionaries({"instruction": mostly_words, "output": mostly_words}, optional={"input": any_text | leaf}),
    st.fixed_dictionaries({"messages": conversation | leaf}),
    st.fixed_dictionaries({"text": mostly_words}),
    any_row,
)
some_rows = st.sampled_from(kinds_of_row).flatmap(lambda kind: st.lists(kind, max_size=4))
no_arguments: st.SearchStrategy[dict[str, Any]] = st.just({})
arguments = no_arguments | st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["auto", "chat", "instruction", "completion", "text"]),
        "validation_split": st.sampled_from([0.0, 0.5, 0.99, 1, 3]),
        "sample_limit": st.sampled_from([1, 2, 100]),
        "columns": st.dictionaries(st.sampled_from(NAMES[:6]), st.sampled_from(NAMES) | any_text, max_size=2),
        "system": any_text,
        "output_template": st.sampled_from(["{output}", "A: {output}\n", "{", ""]),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """JSON lines of rows, some of them broken somewhere."""
    text = "\n".join(json.dumps(row) for row in draw(some_rows))
    content = bytearray(text.encode() or b" ")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if not draw(st.integers(0, 4)) else content)


def csv_text(cells: list[list[str]]) -> bytes:
    return "\n".join(",".join(row) for row in [["prompt", "completion"], *cells]).encode("utf-8", "surrogatepass")


contents = (
    lines()
    | lines()
    | lines()
    | st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(max_size=20).map(lambda text: text.encode("utf-16", "surrogatepass"))
    | st.lists(any_row, max_size=3).map(lambda rows: json.dumps(rows).encode())
    | st.lists(st.lists(any_text, max_size=3), max_size=3).map(csv_text)
    | st.binary(max_size=20).map(lambda content: b"PAR1" + content + b"PAR1")
    | st.binary(max_size=20).map(gzip.compress)
    | st.sampled_from([b"[" * 10_000, b'{"a":' * 5_000, b'{"prompt": ' + b"9" * 5_000 + b"}", b"\xef\xbb\xbf{}"])
)


def examples(most: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf-cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def tokenize(rows: datasets.Dataset, tokenizer: Any, *, max_length: int) -> tuple[datasets.Dataset, TokenReport]:
    tokens = tokenize_rows(rows, tokenizer, sft, max_length=max_length, fingerprint_of="fuzz")
    return trainable(tokens, tokenizer, max_length)


def attempt(tokenizer: Any, dataset: Any, **options: Any) -> HyperionError | None:
    """Everything that a run does with data, as far as it gets; gives what refused it."""
    try:
        processor = DatasetProcessor(dataset, **options)
        processor.check_first_rows()
        sizes = processor.split_sizes()
        train, held_out = processor.prepare()
        assert isinstance(train, datasets.Dataset)
        assert sizes is None or sum(sizes) == len(train) + (len(held_out) if held_out is not None else 0)
        tokenize(train, tokenizer, max_length=64)
    except HyperionError as error:
        return error
    return None


def is_well_told(refusal: HyperionError | None) -> bool:
    told = getattr(refusal, "problems", [refusal]) if refusal else []
    return all(each.what and each.why and each.fix for each in told) and str(refusal).replace("\n", "").isprintable()


@examples(300)
@given(content=contents, suffix=st.sampled_from([".jsonl", ".jsonl", ".json", *SUFFIXES]), options=arguments)
def test_any_bytes_of_any_suffix(
    folder: Path, tokenizer: Any, content: bytes, suffix: str, options: dict[str, Any]
) -> None:
    path = folder / f"data{suffix}"
    path.write_bytes(content)
    refusal = attempt(tokenizer, path, **options)
    assert is_well_told(refusal), refusal


@examples(300)
@given(rows=some_rows, options=arguments)
def test_any_rows(tokenizer: Any, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    refusal = attempt(tokenizer, rows, **options)
    assert is_well_told(refusal), refusal


# --- good rows ---

pair = st.tuples(words, words)


def learnt(tokens: datasets.Dataset, tokenizer: Any) -> list[str]:
    """What is learnt of each row. A label is its token or -100, and the first one is always -100."""
    found = []
    for row in tokens:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == row["length"]
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        assert labels[0] == IGNORED
        found.append(tokenizer.decode([label for label in labels if label != IGNORED]))
    return found


def ended(answer: str) -> str:
    return answer if answer.endswith(END) else answer + END


@examples(60)
@given(pairs=st.lists(pair, min_size=1, max_size=5), max_length=st.integers(2, 60))
def test_of_a_completion_the_answer_and_its_end_are_learnt(
    tokenizer: Any, pairs: list[tuple[str, str]], max_length: int
) -> None:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    prepared, _ = DatasetProcessor(rows).prepare()
    tokens, report = tokenize(prepared, tokenizer, max_length=1000)
    assert learnt(tokens, tokenizer) == [ended(answer) for _, answer in pairs]
    assert [tokenizer.decode(row["input_ids"]) for row in tokens] == [p + ended(answer) for p, answer in pairs]
    assert (report.rows, report.truncated, report.dropped) == (len(pairs), 0, 0)
    assert report.supervised == sum(label != IGNORED for row in tokens for label in row["labels"])
    if not any(label != IGNORED for row in tokens for label in row["labels"][:max_length]):
        with pytest.raises(HyperionError, match="no row has anything to learn"):
            tokenize(prepared, tokenizer, max_length=max_length)
        return
    cut, report = tokenize(prepared, tokenizer, max_length=max_length)
    assert len(cut) + report.dropped == len(pairs)
    assert max(cut["length"]) <= max_length
    whole = {tuple(row["input_ids"][:max_length]) for row in tokens}
    assert all(tuple(row["input_ids"]) in whole for row in cut)


@examples(60)
@given(turns=st.lists(st.lists(pair, min_size=1, max_size=3), min_size=1, max_size=3))
def test_of_a_conversation_every_answer_and_its_end_are_learnt(
    tokenizer: Any, turns: list[list[tuple[str, str]]]
) -> None:
    rows = [
        {
            "messages": [
                {"role": role, "content": text}
                for pair in row
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        }
        for row in turns
    ]
    prepared, _ = DatasetProcessor(rows).prepare()
    tokens, _ = tokenize(prepared, tokenizer, max_length=1000)
    assert learnt(tokens, tokenizer) == ["".join(answer + END for _, answer in row) for row in turns]


@examples(60)
@given(
    count=st.integers(2, 30),
    limit=st.none() | st.integers(2, 40),
    held_out=st.floats(0, 0.5) | st.integers(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_takes_every_row_once_and_the_same_for_the_same_seed(
    count: int, limit: int | None, held_out: float | int, seed: int
) -> None:
    rows = [{"prompt": f"{number}?", "completion": "."} for number in range(count)]

    def split() -> tuple[list[str], list[str]]:
        train, evaluation = DatasetProcessor(rows, sample_limit=limit, validation_split=held_out, seed=seed).prepare()
        return tuple(
            [row["segments"][0]["text"] for row in part] if part is not None else [] for part in (train, evaluation)
        )  # type: ignore[return-value]

    train, evaluation = split()
    assert len(train) + len(evaluation) == min(count, limit or count)
    assert len(set(train + evaluation)) == len(train + evaluation)
    assert (train, evaluation) == split()
