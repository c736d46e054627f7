"""`hyperion data preview`: what is highlighted is what is learnt, and the figures are those of a brute count."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hyperion_core.facts import Segment, Sequence
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hyperion.cli.data_preview import preview
from hyperion.data.collate import Collator
from hyperion.data.encoding import Encoder
from hyperion.data.preview.figures import histogram, packs, padding, percentile
from hyperion.data.preview.html import sample_html
from hyperion.data.preview.spans import Span, shortened, spans
from hyperion.data.preview.terminal import sample_text
from hyperion.engine.batches import Batching, RowBatch

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SPECIALS = ["<s>", "</s>"]


def byte_level() -> Tokenizer:
    """GPT-2's way: a token a byte."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece() -> Tokenizer:
    """Llama's way: a space in front of every text, which decoding takes off again."""
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij:!?"]
    backend = Tokenizer(
        models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def tokenizer_of(backend: Tokenizer, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("backend", [byte_level, sentencepiece])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_highlighted_text_is_exactly_what_is_learnt(backend, adds_bos: bool) -> None:
    tokenizer = tokenizer_of(backend(), adds_bos=adds_bos)
    parts = (("a bad ", False), ("😀 cafe é", True), ("\n? ", False), ("a", True), (" b:", False), (" gib!", True))
    row = Sequence(segments=tuple(Segment(text, learnt) for text, learnt in parts))
    [(ids, learnt)] = Encoder(tokenizer).encode([row], [0])
    labels = [token if wanted else -100 for token, wanted in zip(ids, learnt, strict=True)]

    found = spans(ids, labels, tokenizer)
    joined = [(learnt, "".join(span.text for span in group)) for learnt, group in groupby(found, lambda s: s.learnt)]
    begin = "<s>" if adds_bos else ""
    space = " " if adds_bos and backend is sentencepiece else ""  # that tokenizer's decoding has it
    assert joined == [
        (wanted, (begin + space if number == 0 else "") + text + ("</s>" if number == 5 else ""))
        for number, (text, wanted) in enumerate(parts)
    ]
    assert [span.text for span in found if span.special] == ([begin] if begin else []) + ["</s>"]
    shown = sample_text(found, marked=True).plain
    marked = [re.sub("⏎\n  ", "\n", text) for text in re.findall("⟦(.*?)⟧", shown, re.DOTALL)]
    assert marked == ["😀 cafe é", "a", " gib!</s>"]


def test_a_character_torn_by_the_cut_does_not_move_the_border() -> None:
    tokenizer = tokenizer_of(byte_level())
    ids = tokenizer("ab é", add_special_tokens=False)["input_ids"][:-1]
    found = spans(ids, [-100, -100, *ids[2:]], tokenizer)
    assert [(span.text, span.learnt) for span in found] == [("ab", False), (" \ufffd", True)]


def test_long_texts_lose_their_middle_and_keep_their_borders() -> None:
    found = [Span("p" * 5000 + "END", False), Span("START" + "a" * 5000, True), Span("</s>", True, special=True)]
    short = shortened(found, 300)
    assert sum(len(span.text) + span.left_out for span in short) == sum(len(span.text) for span in found)
    assert [span.learnt for span in short] == [False] * 3 + [True] * 4
    assert short[2].text.endswith("END") and short[3].text.startswith("START") and short[-1] == found[-1]
    assert all(len(span.text) <= 300 for span in short)
    many = shortened([Span("x", bool(number % 2)) for number in range(500)], 300)
    assert len(many) < 100 and sum(len(span.text) + span.left_out for span in many) == 500


class Texts(HTMLParser):
    """All text, the learnt text, and the tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.learnt = self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.learnt += data if "mark" in self.open else ""


def test_html_of_a_row_is_its_text_and_nothing_else() -> None:
    evil = "<script>alert('1')</script>&amp;\"</mark></pre>"
    found = Texts(sample_html([Span(evil, False), Span(f"{evil}\nyes\x1b[2J", True), Span("</s>", True, special=True)]))
    assert found.learnt == f"{evil}⏎\nyes\\x1b[2J</s>"
    assert found.text == evil + found.learnt
    assert set(found.tags) == {"mark", "span"} and not found.open


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, limit=st.integers(1, 45))
@example(lengths=[1, 31], limit=31)  # the longest row fits exactly, in a bar that reaches further
@example(lengths=[1, 31, 100], limit=33)
def test_histogram_counts_every_row_once_and_ends_a_bar_at_max_length(lengths: list[int], limit: int) -> None:
    bars = histogram(lengths, limit)
    assert [bar.rows for bar in bars] == [sum(bar.first <= length <= bar.last for length in lengths) for bar in bars]
    assert sum(bar.rows for bar in bars) == len(lengths)
    assert sum(bar.rows for bar in bars if bar.cut) == sum(length > limit for length in lengths)
    assert all(later.first == bar.last + 1 for bar, later in pairwise(bars))
    assert len(bars) <= 22


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, slack=st.integers(0, 20), rows=st.integers(1, 9))
def test_packs_are_those_that_a_run_makes(lengths: list[int], slack: int, rows: int) -> None:
    """By what makes a run's batches, of rows in the order in which they are read."""
    capacity, order = max(lengths) + slack, list(range(len(lengths)))[::-1]
    batching = Batching(Collator(0), capacity, sharing=False)
    loaded = [[{"input_ids": [1] * lengths[row], "labels": [1] * lengths[row]} for row in order[start : start + rows]]
              for start in range(0, len(order), rows)]  # fmt: skip
    made = [len(batching([RowBatch(step)])[0]) for step in loaded]
    assert packs(lengths, order, rows, capacity) == sum(made)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, size=st.integers(1, 9), drop_last=st.booleans())
def test_padding_is_what_fills_the_batches_up(lengths: list[int], size: int, drop_last: bool) -> None:
    order = list(range(len(lengths)))[::-1]
    batches = [[lengths[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    if drop_last and len(batches[-1]) < size:
        batches.pop()
    found = padding(lengths, order, size, drop_last=drop_last)
    assert found.batches == len(batches) and found.tokens == sum(map(sum, batches))
    assert found.padding == sum(max(batch) - length for batch in batches for length in batch)


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert [percentile([1, 2, 3, 4], percent) for percent in (0, 25, 50, 95, 100)] == [1, 1, 2, 4, 4]


def config_file(folder: Path, base: Path, rows: list[dict], **training: object) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {"base_model": str(base), "adapter": {"type": "lora"}, "training": training}
    config["dataset"] = {"dataset": str(folder / "rows.jsonl"), "validation_split": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "config.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


def test_the_command_shows_what_a_run_reads_and_loads_no_weights(cli, cache, tiny_model: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [{"prompt": f"{evil} {number} plus 1?", "completion": f" {number + 1}\n!"} for number in range(23)]
    rows.append({"prompt": "ab", "completion": " c" * 60})
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    path = config_file(tmp_path, base, rows, max_length=100, per_device_train_batch_size=3, num_train_epochs=2)
    page = tmp_path / "preview.html"
    page.write_text("an older one", encoding="utf-8")

    for weights in base.glob("*.safetensors"):  # the header is read; values are not
        raw = weights.read_bytes()
        weights.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")].ljust(len(raw), b"\xff"))
    shown = cli("data", "preview", path, "--rows", "4")
    assert shown.code == 0, shown.stderr
    answers = [re.sub("⏎\n  ", "\n", text) for text in re.findall("⟦(.*?)⟧", shown.stdout, re.DOTALL)][1:]
    assert len(answers) == 4
    assert all(re.fullmatch(r" \d+\n!<\|im_end\|>|( c)+", answer) for answer in answers), answers
    assert "╌╌ max_length 100" in shown.stdout and "cut at max_length in the" in shown.stdout
    assert re.search(r"^optimizer steps +14 ", shown.stdout, re.MULTILINE)  # ceil(20 / 3) batches, twice
    assert re.search(r"^passes through the model +7 of 3 rows +\d of up to 1,024 tokens$", shown.stdout, re.M)
    assert "This run packs its rows" in shown.stdout and re.search(r"^ok +duplicates: ", shown.stdout, re.MULTILINE)

    preview(path, rows=3, html=page)
    text = page.read_text(encoding="utf-8")
    found = Texts(text)
    assert "script" not in found.tags and evil in found.text and not {"img", "link", "iframe"} & set(found.tags)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert str(tmp_path) not in text and str(tmp_path) not in shown.stdout
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith((".", "preview"))) == [
        "preview.html"
    ]


def test_data_that_the_audit_refuses_are_shown_all_the_same(cache, tiny_model: Path, tmp_path: Path, capsys) -> None:
    rows = [{"prompt": "long " * 50 + str(number), "completion": str(number)} for number in range(40)]
    preview(config_file(tmp_path, tiny_model, rows, max_length=32), rows=3, html=None)
    shown = capsys.readouterr().out
    assert "0 learnt; cut from" in shown and "left out of training" in shown
    assert "refused" in shown and "would not start" in shown


@pytest.mark.parametrize("target", ["missing/preview.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_any_work(
    cli, tiny_model: Path, tmp_path: Path, target
) -> None:
    path = config_file(tmp_path, tiny_model, [{"prompt": "a", "completion": "b"}] * 9)
    done = cli("data", "preview", path, "--html", target)
    assert done.code == 2 and done.stdout == ""
    assert "the preview cannot be written" in done.stderr and "why:" in done.stderr and "fix:" in done.stderr
