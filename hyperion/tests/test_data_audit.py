"""The audit names each fault by which fine-tuning goes silently wrong, and lets clean data pass.

A faulty pipeline is played by changing what `tokenize_rows` made into what such a pipeline would have made.
"""

from __future__ import annotations

import datasets
import pytest
from byte_tokenizer import CHATML, LLAMA2, byte_tokenizer, sft
from hyperion_core.errors import ConfigError, HyperionError

from hyperion.config import FinetuneConfig
from hyperion.data import DatasetProcessor
from hyperion.data.audit import CHECKS, AuditConfig, AuditError
from hyperion.data.audit.audit import AuditedData, audit
from hyperion.data.tokenization import tokenize_rows

LLAMA3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}<|sep|>\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% else %} {{ m['content'] }}\n\n"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def chats(count=24, start=0):
    return [
        {"messages": [
            {"role": "user", "content": f"What is {n}+{n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
            {"role": "user", "content": f"And {n}*3?"},
            {"role": "assistant", "content": f"That is {3 * n}, surely."},
        ]}
        for n in range(start, start + count)
    ]  # fmt: skip


def tasks(count=24):
    return [{"instruction": f"Double {n}.", "output": f"{2 * n} it is."} for n in range(count)]


def made(rows, tokenizer, *, max_length=1000, faulty=None, **options):
    """Rows and their tokens, each row of tokens through `faulty`, which plays the buggy pipeline."""
    prepared = DatasetProcessor(rows, **options).prepare()[0]
    tokens = tokenize_rows(prepared, tokenizer, sft, max_length=max_length, fingerprint_of="sft")
    if faulty is not None:
        spoilt = [faulty(tokens[number]) for number in range(len(tokens))]
        tokens = datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in spoilt])
    return AuditedData(prepared, tokens)


def audited(data, tokenizer, evaluation=None, *, max_length=1000, config=None, **options):
    return audit(data, evaluation, tokenizer, sft, max_length=max_length, config=config, **options)


def refused(report):
    return {finding.name: finding for finding in report.of("refused")}


@pytest.mark.parametrize(
    ("rows", "tokenizer", "options"),
    [
        (chats(), byte_tokenizer(), {}),
        (chats(), byte_tokenizer(adds_bos=True), {}),
        (chats(), byte_tokenizer(chat_template=LLAMA2, eos="</s>"), {}),
        (chats(), byte_tokenizer(chat_template=LLAMA3), {}),
        (chats(), byte_tokenizer(chat_template=PLAIN, eos="</s>"), {}),
        (tasks(), byte_tokenizer(adds_bos=True, eos="</s>"), {}),
        (
            tasks(),
            byte_tokenizer(),
            {"instruction_template": "### {instruction}", "output_template": "> {output} <end>"},
        ),
        ([{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(9)], byte_tokenizer(), {}),
        ([{"text": f"All about {n}."} for n in range(9)], byte_tokenizer(adds_bos=True), {}),
        (chats(1), byte_tokenizer(), {}),
    ],
    ids=[
        "chatml",
        "chatml-bos",
        "llama2",
        "llama3",
        "plain",
        "instruction",
        "own-template",
        "completion",
        "text",
        "one-row",
    ],
)
def test_what_our_own_path_makes_of_clean_data_passes_whole(rows, tokenizer, options):
    report = audited(made(rows, tokenizer, **options), tokenizer)
    assert [(finding.name, finding.what) for finding in report.findings if finding.state != "ok"] == []
    assert {finding.name for finding in report.findings} == set(CHECKS) - {"overlap"}
    report.refuse()


# --- the known faults of the field ---


def test_loss_zero_on_fully_masked_rows():
    tokenizer = byte_tokenizer()
    data = made(chats(), tokenizer, faulty=lambda row: (row["input_ids"], [-100] * row["length"]))
    found = refused(audited(data, tokenizer))["supervised"]
    assert found.counts["learnt"] == 0 and found.counts["rows_without"] == 24
    assert "loss" in found.why and "0.0" in found.why and found.examples[0].startswith("row 0: ")


def test_some_fully_masked_rows_are_counted_against_the_threshold():
    tokenizer, number = byte_tokenizer(), iter(range(100))
    data = made(
        tasks(40),
        tokenizer,
        faulty=lambda row: (row["input_ids"], [-100] * row["length"] if next(number) < 3 else row["labels"]),
    )
    assert refused(audited(data, tokenizer))["supervised"].counts["rows_without"] == 3
    report = audited(data, tokenizer, config=AuditConfig(max_unlearnt_rows=0.1))
    assert "supervised" in {finding.name for finding in report.of("warned")}


def test_eos_masked_as_padding():
    tokenizer = byte_tokenizer(eos="</s>")
    pad = tokenizer.pad_token_id
    assert pad == tokenizer.eos_token_id

    def masks_padding_by_id(row):
        ids = row["input_ids"] + [pad] * 3
        labels = row["labels"] + [pad] * 3
        return ids, [-100 if token == pad else label for token, label in zip(ids, labels, strict=True)]

    found = refused(audited(made(tasks(), tokenizer, faulty=masks_padding_by_id), tokenizer))["eos"]
    assert found.counts["without"] == found.counts["masked"] == 24
    assert "padding and end are one token" in found.why


def test_eos_that_was_never_put_in():
    tokenizer = byte_tokenizer(eos="</s>")
    data = made(tasks(), tokenizer, faulty=lambda row: (row["input_ids"][:-1], row["labels"][:-1]))
    found = refused(audited(data, tokenizer))["eos"]
    assert found.counts["without"] == 24 and found.counts["masked"] == 0


def edges(labels):
    """(start, stop) of each learnt stretch."""
    learnt = [label != -100 for label in [-100, *labels, -100]]
    starts = [at for at in range(len(labels)) if learnt[at + 1] and not learnt[at]]
    stops = [at for at in range(1, len(labels) + 1) if learnt[at] and not learnt[at + 1]]
    return list(zip(starts, stops, strict=True))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2])
@pytest.mark.parametrize("start", [-1, 0, 1])
@pytest.mark.parametrize("stop", [-1, 0, 1])
def test_multi_turn_mask_that_is_off_by_one_at_either_side(template, start, stop):
    if not start and not stop:
        return
    tokenizer = byte_tokenizer(chat_template=template, eos="</s>" if template is LLAMA2 else "<|im_end|>")

    def off(row):
        labels = [-100] * row["length"]
        for begins, ends in edges(row["labels"]):
            for at in range(begins + start, min(ends + stop, row["length"])):
                labels[at] = row["input_ids"][at]
        return row["input_ids"], labels

    found = refused(audited(made(chats(), tokenizer, faulty=off), tokenizer))
    assert "masking" in found, (start, stop)
    assert found["masking"].counts["wrong"] == 24 and found["masking"].examples


def test_only_the_last_turn_learnt_is_not_what_the_rows_say():
    tokenizer = byte_tokenizer()

    def last_only(row):
        begins, _ = edges(row["labels"])[-1]
        return row["input_ids"], [-100] * begins + row["labels"][begins:]

    assert "masking" in refused(audited(made(chats(), tokenizer, faulty=last_only), tokenizer))


def test_labels_that_were_shifted_already():
    tokenizer = byte_tokenizer()
    data = made(chats(), tokenizer, faulty=lambda row: (row["input_ids"], [*row["labels"][1:], -100]))
    assert "shift" in refused(audited(data, tokenizer))["masking"].why


def test_prompt_learnt_with_the_answer():
    tokenizer = byte_tokenizer()
    data = made(tasks(), tokenizer, faulty=lambda row: (row["input_ids"], [-100, *row["input_ids"][1:]]))
    assert "masking" in refused(audited(data, tokenizer))


def test_double_bos():
    tokenizer = byte_tokenizer(chat_template=LLAMA3, adds_bos=True)

    def tokenizes_rendered_text_with_special_tokens(row):
        return [tokenizer.bos_token_id, *row["input_ids"]], [-100, *row["labels"]]

    found = refused(audited(made(chats(), tokenizer, faulty=tokenizes_rendered_text_with_special_tokens), tokenizer))
    assert set(found) == {"bos"} and found["bos"].counts["doubled"] == 24 and "<s>" in found["bos"].what


# --- every other check ---


def test_truncation_that_removed_answers_wholly_and_partly():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "p" * (90 if n < 2 else 80 if n < 4 else 5), "completion": "answer to it"} for n in range(24)]
    found = refused(audited(made(rows, tokenizer, max_length=90), tokenizer, max_length=90))["truncation"]
    assert (found.counts["wholly"], found.counts["partly"], found.threshold) == (2, 2, 0.05)
    lenient = audited(made(rows, tokenizer, max_length=90), tokenizer, max_length=90,
                      config=AuditConfig(max_truncated_answers=0.5))  # fmt: skip
    assert lenient.passed and "truncation" in {finding.name for finding in lenient.of("warned")}


def test_a_template_that_is_not_in_the_tokens():
    tokenizer = byte_tokenizer()

    def only_contents(row):  # joined without the template
        keep = [at for at, token in enumerate(row["input_ids"]) if token > 4]
        return [row["input_ids"][at] for at in keep], [row["labels"][at] for at in keep]

    assert "template" in refused(audited(made(chats(), tokenizer, faulty=only_contents), tokenizer))
    clean = made(tasks(), tokenizer)
    assert "template" in refused(audited(clean, tokenizer, literals=("### Response:",)))
    assert audited(clean, tokenizer, literals=("Task:\n", "Answer:\n")).passed


def test_rows_repeated_beyond_the_threshold():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": f"p{n % 50}", "completion": f" A {n % 50}" if n % 2 else f" a  {n % 50}"} for n in range(150)]
    found = refused(audited(made(rows, tokenizer), tokenizer))["duplicates"]
    assert found.counts == {"rows": 150, "repeated": 100}
    assert audited(made(rows[:60], tokenizer), tokenizer).passed  # too few rows to refuse
    assert audited(made(rows, tokenizer), tokenizer, config=AuditConfig(max_duplicates=0.7)).passed


def test_evaluation_rows_that_are_trained_on():
    tokenizer = byte_tokenizer()
    train, held_out = made(chats(24), tokenizer), made(chats(24, start=23), tokenizer)
    found = refused(audited(train, tokenizer, held_out))["overlap"]
    assert found.counts["same"] == 1 and found.data == "evaluation"
    rows = chats(24)
    rows[0]["messages"][-1]["content"] = "another answer"
    report = audited(train, tokenizer, made(rows[:1], tokenizer))
    assert report.passed
    assert next(f for f in report.of("warned") if f.name == "overlap").counts["same_prompt"] == 1


def test_chat_templates_that_disagree():
    tokenizer = byte_tokenizer()
    data = made(chats(), tokenizer)
    found = refused(audited(data, tokenizer, own_chat_template=LLAMA3))
    assert set(found) == {"chat_template"} and len(found["chat_template"].examples) == 2
    assert audited(data, tokenizer, own_chat_template=f"{CHATML}\n").passed


def test_special_tokens_that_this_tokenizer_splits():
    tokenizer = byte_tokenizer(specials=(), eos="</s>")
    found = refused(audited(made(chats(), tokenizer), tokenizer))["special_tokens"]
    assert "<|im_start|>" in found.what and "<|im_start|> becomes 12 tokens" in found.why


def test_special_tokens_inside_a_users_text():
    tokenizer, rows = byte_tokenizer(), chats(40)
    rows[3]["messages"][0]["content"] = "What does <|im_end|> do?"
    report = audited(made(rows, tokenizer), tokenizer)
    assert "row 3: <|im_end|>" in next(f for f in report.of("warned") if f.name == "special_tokens").examples[0]


# --- what is done with it ---


def test_every_refusal_is_told_at_once_and_each_may_be_allowed():
    tokenizer = byte_tokenizer(chat_template=LLAMA3)

    def faulty(row):
        return [0, *row["input_ids"]], [-100] * (row["length"] + 1)

    data = made(chats(), tokenizer, faulty=faulty)
    report = audited(data, tokenizer)
    with pytest.raises(AuditError) as caught:
        report.refuse()
    assert isinstance(caught.value, HyperionError) and caught.value.exit_code == 2
    assert {"bos", "supervised", "masking"} <= set(refused(report))
    assert all(f"\n  {name}: " in str(caught.value) for name in refused(report))
    assert audited(data, tokenizer, config=AuditConfig(allow=list(refused(report)))).passed
    assert not any("examples" in finding for finding in report.as_data(examples=False)["findings"])


def test_config_keys_are_checked():
    base = {"base_model": "x", "adapter": "lora"}
    with pytest.raises(ConfigError, match="duplicates") as caught:
        FinetuneConfig.parse({**base, "audit": {"allow": ["duplicate"], "max_overlap": 2, "max_duplicate": 0.1}})
    assert len(caught.value.problems) == 3
    assert FinetuneConfig.parse({**base, "audit": {"allow": ["bos"]}}).audit.allow == ["bos"]
