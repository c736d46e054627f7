"""`DatasetProcessor`: every kind of source, sampling and splitting, and the errors a user meets."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from contextlib import contextmanager

import datasets
import pytest
from hyperion_core.errors import DataError

from hyperion.data import DatasetProcessor
from hyperion.data.arguments import DataArgumentsError

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(dataset):
    return [row["segments"][-1]["text"] for row in dataset]


def test_constructing_and_counting_load_nothing_heavy(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    code = f"""
import sys
from hyperion.data import DatasetProcessor
processor = DatasetProcessor({str(path)!r}, validation_split=0.1, sample_limit=20)
assert (processor.row_count(), processor.split_sizes(), processor.detected_format()) == (40, (18, 2), "completion")
processor.provenance()
print([name for name in ("torch", "transformers", "datasets", "pyarrow", "pandas", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_local_kinds_give_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(row) for row in ROWS))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    expected = [f"a{n}" for n in range(40)]
    for name in ("d.jsonl", "array.json", "lines.json", "d.csv", "d.parquet", "saved", "splits"):
        processor = DatasetProcessor(name, base_dir=tmp_path)
        train, held_out = processor.prepare()
        assert (answers(train), held_out) == (expected, None), name
        assert processor.row_count() in (40, None) and (processor.row_count() or "saved" in name or name == "splits")
    for given in (ROWS, table, table.with_format("torch")):
        assert answers(DatasetProcessor(given).prepare()[0]) == expected
    assert answers(DatasetProcessor("splits", base_dir=tmp_path, split="test").prepare()[0]) == ["a1"]


def test_files_are_memory_mapped_and_read_once(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    first, _ = DatasetProcessor(path).prepare()
    assert first.cache_files
    monkeypatch.setattr("hyperion.data.sources.read_rows", lambda *a: iter([("", ROWS[0])]))  # for the columns
    again, _ = DatasetProcessor(path).prepare()
    assert answers(again) == answers(first) and again._fingerprint == first._fingerprint
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    write_jsonl(path, ROWS[:3])
    assert len(DatasetProcessor(path).prepare()[0]) == 3  # other content, other rows


def test_values_keep_their_text(tmp_path):
    """Dates, "None" and numbers in csv stay texts; so do dates in jsonl."""
    (tmp_path / "d.csv").write_text('prompt,completion\nwhen,None\nhow,007\nq,"a\n""b"""\n')
    assert answers(DatasetProcessor(tmp_path / "d.csv").prepare()[0]) == ["None", "007", 'a\n"b"']
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "when", "completion": "2024-01-02"}])
    assert answers(DatasetProcessor(path).prepare()[0]) == ["2024-01-02"]


def test_text_file_is_a_row_a_line(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo {x}")
    processor = DatasetProcessor(tmp_path / "d.txt")
    assert processor.row_count() == 2
    assert processor.prepare()[0][:] == {
        "segments": [[{"text": "one", "supervised": True}], [{"text": "two {x}", "supervised": True}]]
    }


def test_folder_reads_its_files_in_order_and_samples_across_them(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[20:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:20])
    assert answers(DatasetProcessor(tmp_path).prepare()[0]) == [row["completion"] for row in ROWS]
    sampled = answers(DatasetProcessor(tmp_path, sample_limit=10).prepare()[0])
    assert sampled == answers(DatasetProcessor(ROWS, sample_limit=10).prepare()[0])
    (tmp_path / "c.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"several kinds: \.csv, \.jsonl"):
        DatasetProcessor(tmp_path)


def test_package_resource_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "acme_rows"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_jsonl(package / "d.jsonl", ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(DatasetProcessor("package://acme_rows/d.jsonl").prepare()[0]) == 40
    with pytest.raises(DataError, match="not installed"):
        DatasetProcessor("package://acme_nothing/d.jsonl")
    with pytest.raises(DataError, match="no resource"):
        DatasetProcessor("package://acme_rows/../secret.jsonl")


def test_split_is_deterministic_disjoint_and_after_the_limit():
    def split(**options):
        train, held_out = DatasetProcessor(ROWS, sample_limit=20, validation_split=0.25, **options).prepare()
        return answers(train), answers(held_out)

    train, held_out = split()
    assert (len(train), len(held_out)) == (15, 5)
    assert not set(train) & set(held_out)
    assert train == sorted(train, key=lambda a: int(a[1:]))  # the source's order is kept
    assert split() == (train, held_out)
    assert split(seed=1) != (train, held_out)
    # Frozen: the rows held out may not change with a release of ours or of numpy.
    assert held_out == ["a0", "a4", "a16", "a31", "a34"]


def test_validation_split_by_rows_and_at_least_one():
    assert [len(d) for d in DatasetProcessor(ROWS, validation_split=7).prepare()] == [33, 7]
    assert [len(d) for d in DatasetProcessor(ROWS, validation_split=0.001).prepare()] == [39, 1]
    with pytest.raises(DataError, match="too few rows to hold out 40"):
        DatasetProcessor(ROWS, validation_split=40).prepare()


def texts(dataset):
    return [" ".join(segment["text"] for segment in row["segments"]).lower().split() for row in dataset]


def test_copies_of_a_row_are_never_parted_and_the_number_is_kept():
    rows = [{"prompt": f"q{n}", "completion": f" a{n}"} for n in range(30) for _ in range(1 + n % 3)]
    rows[4] = {"prompt": "Q2 ", "completion": "  A2\n"}  # the audit takes it for a copy
    for seed in range(20):
        train, held_out = DatasetProcessor(rows, validation_split=0.2, seed=seed).prepare()
        assert len(held_out) == 12
        assert len(train) == 48
        assert not [text for text in texts(held_out) if text in texts(train)]
        assert answers(held_out) == answers(DatasetProcessor(rows, validation_split=0.2, seed=seed).prepare()[1])


@pytest.mark.parametrize(
    ("copies", "asked", "held_out"),
    [([5] * 20, 7, {5}), ([5] * 20, 10, {10}), ([10, 90], 2, {10}), ([90, 9], 95, {90, 9}), ([1] * 9 + [30], 5, {5})],
    ids=["fewer", "even", "never none", "never all", "the rest make it up"],
)
def test_sets_of_copies_are_held_out_while_they_fit(copies, asked, held_out):
    rows = [{"prompt": f"q{n}", "completion": "a"} for n, many in enumerate(copies) for _ in range(many)]
    for seed in range(5):
        processor = DatasetProcessor(rows, validation_split=asked, seed=seed)
        train, evaluation = processor.prepare()
        assert len(evaluation) in held_out
        assert len(train) + len(evaluation) == len(rows)
        assert not [text for text in texts(evaluation) if text in texts(train)]
        assert processor.provenance()["eval_rows"] == len(evaluation)


def test_rows_that_are_all_the_same_cannot_be_held_out():
    with pytest.raises(DataError, match="its 40 rows are all the same") as error:
        DatasetProcessor(ROWS[:1] * 40, validation_split=0.1).prepare()
    assert "stay on one side" in error.value.why
    assert "validation_split to 0" in error.value.fix


def test_rows_without_copies_are_split_as_the_drawn_order_says():
    """As in every release: a run that is resumed must find its rows again."""
    import numpy as np

    for seed in range(5):
        order = np.random.RandomState(seed).permutation(40)
        train, held_out = DatasetProcessor(ROWS, validation_split=0.3, seed=seed).prepare()
        assert answers(held_out) == [f"a{n}" for n in sorted(order[:12])]
        assert answers(train) == [f"a{n}" for n in sorted(order[12:])]


def test_only_sampled_rows_are_decoded(tmp_path):
    rows = [{"prompt": "q", "completion": f"a{n}"} for n in range(300)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    kept = answers(DatasetProcessor(path, sample_limit=5).prepare()[0])
    lines = [json.dumps(row) if n < 100 or row["completion"] in kept else "{broken" for n, row in enumerate(rows)]
    path.write_text("\n".join(lines))  # the first hundred are looked at for the columns
    assert answers(DatasetProcessor(path, sample_limit=5).prepare()[0]) == kept
    with pytest.raises(DataError, match=r"d\.jsonl:101 is not JSON"):
        DatasetProcessor(path).prepare()


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    rows = [*ROWS[:2], {"prompt": "x"}, ROWS[3], {"prompt": "", "completion": "y"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match="2 rows that cannot be trained on") as caught:
        DatasetProcessor(path).prepare()
    assert caught.value.why.splitlines() == [
        'd.jsonl:3: "completion" is missing',
        'd.jsonl:5: "prompt" is empty',
    ]
    with pytest.raises(DataError) as caught:
        DatasetProcessor(rows).prepare()
    assert 'row 2: "completion" is missing' in caught.value.why
    with pytest.raises(DataError) as caught:
        DatasetProcessor(datasets.Dataset.from_list(rows)).prepare()
    assert "the dataset, row 4" in caught.value.why


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', "d.jsonl:2 is not JSON"),
        ("d.jsonl", b'"a"\n', "d.jsonl:1 is not a JSON object"),
        ("d.json", b'[{"text": "a"},\n {"text" "b"}]', "d.json:2 is not JSON"),
        ("d.csv", b"text,b\n1\n", "d.csv:2 has 1 cells where the header has 2"),
        ("d.txt", b"caf\xe9\n", "not UTF-8"),
        ("d.parquet", b"nothing", "cannot be loaded"),
        ("d.jsonl", b"", "has no rows"),
    ],
)
def test_broken_files_say_where(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what):
        DatasetProcessor(tmp_path / name).prepare()


def test_all_argument_problems_in_one_error():
    with pytest.raises(DataArgumentsError) as caught:
        DatasetProcessor(
            "missing.jsonl",
            instruction_template="{input}",
            output_template="{output}{output}",
            sample_limit=0,
            validation_split=1.0,
            format="chta",
            columns={"qestion": "q"},
            seed=-1,
            system=" ",
        )
    assert [problem.path for problem in caught.value.problems] == [
        "",
        "instruction_template",
        "output_template",
        "format",
        "system",
        "columns.qestion",
        "sample_limit",
        "validation_split",
        "seed",
    ]
    assert 'did you mean "chat"?' in str(caught.value)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"system": "S"}, "system"),
        ({"system": "S", "format": "completion"}, "system"),
        ({"output_template": "{output}"}, "output_template"),
        ({"output_template": "{output}", "format": "chat"}, "output_template"),
        ({"split": "test"}, "split"),
        ({"name": "x", "revision": "y"}, "name"),
        ({"sample_limit": 5, "validation_split": 5}, "validation_split"),
        ({"validation_split": True}, "validation_split"),
    ],
)
def test_arguments_without_effect_or_sense_are_refused(options, path):
    with pytest.raises(DataArgumentsError) as caught:
        DatasetProcessor(ROWS, **options).prepare()
    assert caught.value.problems[0].path == path


def test_wrong_kinds_of_dataset():
    with pytest.raises(DataError, match="DatasetDict"):
        DatasetProcessor(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}))
    with pytest.raises(DataError, match="row 1 of the list is str"):
        DatasetProcessor([{"text": "a"}, "b"])
    with pytest.raises(DataError, match="cannot be int"):
        DatasetProcessor(3)
    with pytest.raises(DataError, match="has no rows"):
        DatasetProcessor(datasets.Dataset.from_dict({"text": []})).prepare()


def test_missing_file_suggests_its_neighbour(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r'did you mean "train\.jsonl"'):
        DatasetProcessor(tmp_path / "trian.jsonl")


def test_hub_dataset(monkeypatch):
    asked = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def load_dataset(path, **options):
        asked.update(options, path=path)
        table = datasets.Dataset.from_list([{"instruction": "I", "output": "O", "text": "I O"}])
        table.info.download_checksums = {f"hf://datasets/acme/rows@{commit}/d.parquet": {}}
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    processor = DatasetProcessor("acme/rows", name="small", split="train[:10]", revision="main")
    assert (processor.row_count(), processor.split_sizes(), processor.detected_format()) == (None, None, None)
    assert answers(processor.prepare()[0]) == ["O"]
    assert asked == {"path": "acme/rows", "name": "small", "split": "train[:10]", "revision": "main"}
    assert processor.provenance()["revision"] == commit


def test_hub_dataset_that_cannot_be_had(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="acme/rows cannot be loaded") as caught:
        DatasetProcessor("acme/rows").prepare()
    assert "HF_HUB_OFFLINE" in caught.value.fix and isinstance(caught.value.__cause__, ConnectionError)


def test_saved_dataset_without_the_split(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match='no split "train"') as caught:
        DatasetProcessor(tmp_path / "saved").prepare()
    assert caught.value.why == "its splits are test"
    processor = DatasetProcessor(tmp_path / "saved", split="test")
    processor.prepare()
    assert processor.provenance()["kind"] == "saved dataset" and processor.provenance()["split"] == "test"


def test_provenance_of_files(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    processor = DatasetProcessor("d.jsonl", base_dir=tmp_path, validation_split=0.1)
    before = processor.provenance()
    processor.prepare()
    after = json.loads(json.dumps(processor.provenance()))
    assert before["rows"] == after["rows"] == 40
    assert (after["source"], after["kind"]) == ("d.jsonl", "files")
    assert after["files"][0]["bytes"] == path.stat().st_size and len(after["files"][0]["sha256"]) == 64
    assert (after["train_rows"], after["eval_rows"], after["format"]) == (36, 4, "completion")
    assert after["arguments"]["validation_split"] == 0.1


def test_progress_is_told_to_the_caller(tmp_path):
    seen = []

    class Progress:
        @contextmanager
        def task(self, description, total=None):
            seen.append((description, total))
            yield seen.append

    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    DatasetProcessor("d.jsonl", base_dir=path.parent).prepare(Progress())
    assert seen == [("reading d.jsonl", 40), *[1] * 40]
    assert not datasets.are_progress_bars_disabled()
