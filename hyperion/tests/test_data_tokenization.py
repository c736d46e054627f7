"""Segments and messages to tokens: what is learnt, what is cut, what is cached."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict

import datasets
import pytest
from byte_tokenizer import CHATML, byte_tokenizer, sft
from hyperion_core.errors import DataError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperion.data import DatasetProcessor
from hyperion.data import tokenization as module
from hyperion.data.tokenization import tokenize_rows, trainable

# Its prompt is no prefix of the conversation, and its tags say what the assistant's part is.
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def run(rows, tokenizer, *, max_length=1000, fingerprint_of="sft", **options):
    dataset = rows if isinstance(rows, datasets.Dataset) else DatasetProcessor(rows).prepare()[0]
    tokens = tokenize_rows(dataset, tokenizer, sft, max_length=max_length, fingerprint_of=fingerprint_of, **options)
    return trainable(tokens, tokenizer, max_length)


def texts(tokens, tokenizer, row=0):
    """(everything, what is learnt) of one row, decoded; the labels are checked against the ids."""
    ids, labels = tokens[row]["input_ids"], tokens[row]["labels"]
    assert len(ids) == len(labels) == tokens[row]["length"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])


def test_prompt_is_not_learnt_and_eos_is_although_it_is_the_padding_token():
    tokenizer = byte_tokenizer()
    tokens, report = run([{"prompt": "2+2=", "completion": "4"}], tokenizer)
    assert texts(tokens, tokenizer) == ("2+2=4<|im_end|>", "4<|im_end|>")
    assert tokens.column_names == ["input_ids", "labels", "length"]
    assert asdict(report) == {
        "rows": 1, "tokens": 6, "supervised": 2, "truncated": 0, "dropped": 0, "longest": 6, "warnings": (),
    }  # fmt: skip


def test_eos_and_bos_are_never_doubled():
    tokenizer = byte_tokenizer(adds_bos=True)
    rows = [{"prompt": "<s>a", "completion": "b<|im_end|>"}, {"prompt": "a", "completion": "b"}]
    tokens, _ = run(rows, tokenizer)
    assert [texts(tokens, tokenizer, row) for row in (0, 1)] == [("<s>ab<|im_end|>", "b<|im_end|>")] * 2
    assert texts(run(rows[1:], byte_tokenizer())[0], tokenizer)[0] == "ab<|im_end|>"  # it adds none itself


def test_tokens_do_not_merge_across_the_border_of_prompt_and_answer():
    tokenizer = byte_tokenizer(merges=[("Ġ", "y")])
    assert len(tokenizer.encode("A: y")) == 3  # as one text, the prompt's space is lost to the answer
    tokens, _ = run([{"prompt": "A: ", "completion": "y"}], tokenizer)
    assert tokens[0]["input_ids"] == [*tokenizer.encode("A: "), *tokenizer.encode("y"), tokenizer.eos_token_id]


def test_plain_text_is_learnt_but_for_the_first_token_that_nothing_predicts():
    tokenizer = byte_tokenizer()
    assert texts(run([{"text": "abc"}], tokenizer)[0], tokenizer) == ("abc<|im_end|>", "bc<|im_end|>")


def test_multi_turn_chat_learns_exactly_the_assistants_turns_and_equals_the_template():
    tokenizer = byte_tokenizer()
    messages = [
        {"role": "system", "content": "S {x}"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": " one\n"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "two é"},
    ]
    tokens, _ = run([{"messages": messages}], tokenizer)
    assert texts(tokens, tokenizer)[1] == " one\n<|im_end|>two é<|im_end|>"
    assert tokens[0]["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_generation_tags_are_used_when_prompts_are_no_prefixes():
    tokenizer = byte_tokenizer(chat_template=TAGGED)
    rows = [{"prompt": "hi", "completion": "one"}]
    tokens, _ = run(DatasetProcessor(rows, format="chat").prepare()[0], tokenizer)
    assert texts(tokens, tokenizer)[1] == "one<|im_end|>"


@pytest.mark.parametrize(
    ("template", "what", "fix"),
    [
        (None, "no chat template", "instruction rows"),
        (
            CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"),
            "row 0: .*assistant's",
            "generation",
        ),
        ("{{ raise_exception('roles must alternate') }}", "row 0: the chat template refuses", "roles"),
    ],
)
def test_chat_templates_that_do_not_serve(template, what, fix):
    chat = DatasetProcessor([{"prompt": "hi", "completion": "one"}], format="chat").prepare()[0]
    with pytest.raises(DataError, match=what) as caught:
        run(chat, byte_tokenizer(chat_template=template))
    assert fix in caught.value.fix


def test_a_template_that_writes_todays_date_gives_the_same_tokens_on_every_day():
    template = "{{ strftime_now('%d %B %Y') }}|" + CHATML
    tokenizer = byte_tokenizer(chat_template=template)
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    tokens, _ = run(rows, tokenizer)
    assert tokenizer.decode(tokens[0]["input_ids"]).startswith("26 July 2024|")


def test_chat_template_without_end_of_turn_gets_an_end_of_sequence():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    chat = DatasetProcessor([{"prompt": "hi", "completion": "one"}], format="chat").prepare()[0]
    assert texts(run(chat, tokenizer)[0], tokenizer) == ("user: hi\nassistant: one<|im_end|>", "one<|im_end|>")


def test_later_pieces_get_no_space_from_a_tokenizer_that_prefixes_one():
    letters = ["<unk>", "▁", "a", "b", "\n", ":", "▁a", "</s>"]
    backend = Tokenizer(models.BPE({t: n for n, t in enumerate(letters)}, [("▁", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokens, _ = run([{"prompt": "a:", "completion": "a b"}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens[0]["input_ids"]) == ["▁a", ":", "a", "▁", "b", "</s>"]


def test_truncation_is_counted_and_rows_without_anything_left_are_dropped_visibly():
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "12345678", "completion": "lost"},  # 13 tokens, the prompt alone fills the length
        {"prompt": "1234", "completion": "kept but cut"},
        {"prompt": "1", "completion": "whole"},
    ]
    tokens, report = run(rows, tokenizer, max_length=8)
    assert [texts(tokens, tokenizer, row)[1] for row in range(2)] == ["kept", "whole<|im_end|>"]
    assert (report.rows, report.tokens, report.supervised) == (2, 15, 10)
    assert (report.truncated, report.dropped, report.longest) == (2, 1, 17)
    assert "1 of 3 rows are left out" in report.warnings[0] and "longest row has 17 tokens" in report.warnings[0]


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(DataError, match="no row has anything to learn") as caught:
        run([{"prompt": "12345678", "completion": "lost"}], byte_tokenizer(), max_length=8)
    assert "raise max_length (the longest row has 13 tokens)" in caught.value.fix
    rows = datasets.Dataset.from_list([{"segments": [{"text": "abc", "supervised": False}]}])
    with pytest.raises(DataError, match="no row has anything to learn") as caught:
        run(rows, byte_tokenizer())
    assert "no token of any row is supervised" in caught.value.why
    with pytest.raises(DataError, match="no rows to tokenize"):
        run(rows.select([]), byte_tokenizer())


def test_tokenizer_without_eos_warns():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokens, report = run([{"prompt": "a", "completion": "b"}], tokenizer)
    assert texts(tokens, tokenizer) == ("ab", "b") and "no end-of-sequence token" in report.warnings[0]


def test_one_sequence_a_row_is_asked_for():
    rows = DatasetProcessor([{"text": "a"}]).prepare()[0]
    with pytest.raises(DataError, match="makes 2 sequences of row 0"):
        tokenize_rows(rows, byte_tokenizer(), lambda row: sft(row) * 2, max_length=9, fingerprint_of="dpo")


def test_tokens_are_cached_until_something_that_decides_them_changes(tmp_path, monkeypatch):
    passes = []

    class Counting(module._TokenizeBatch):
        def __call__(self, *args):
            passes.append(1)
            return super().__call__(*args)

    monkeypatch.setattr(module, "_TokenizeBatch", Counting)
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]

    def go(tokenizer, *, rows=chat, max_length=100, objective="sft"):
        before = len(passes)
        _, report = run(rows, tokenizer, max_length=max_length, fingerprint_of=objective, cache_dir=tmp_path / "tokens")
        return len(passes) > before, report

    assert go(byte_tokenizer()) == (True, go(byte_tokenizer())[1])
    used = byte_tokenizer()
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves its traces in the backend
    assert not go(used)[0]
    assert go(byte_tokenizer(chat_template=CHATML.replace("\n", " ")))[0]
    assert go(byte_tokenizer(merges=[("a", "b")]))[0]
    assert go(byte_tokenizer(), max_length=99)[0]
    assert go(byte_tokenizer(), objective="sft 2")[0]
    assert go(byte_tokenizer(), rows=[{"messages": [*chat[0]["messages"], *chat[0]["messages"]]}])[0]
    assert not go(byte_tokenizer())[0]


def test_progress_is_told_to_the_caller():
    seen = []

    class Progress:
        @contextmanager
        def task(self, description, total=None):
            seen.append((description, total))
            yield seen.append

    run([{"text": "a b"}] * 3, byte_tokenizer(), progress=Progress())
    assert seen == [("tokenizing", 3), 3]


def test_several_processes_give_the_same_tokens():
    rows = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 9)]
    alone, together = (run(rows, byte_tokenizer(), num_proc=n) for n in (1, 2))
    assert alone[0][:] == together[0][:] and alone[1] == together[1]


def test_chat_template_errors_come_out_of_other_processes():
    chat = DatasetProcessor([{"prompt": "hi", "completion": "one"}] * 4, format="chat").prepare()[0]
    with pytest.raises(DataError, match="no chat template") as caught:
        run(chat, byte_tokenizer(chat_template=None), num_proc=2)
    assert caught.value.fix
