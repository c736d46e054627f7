"""`hyperion compare`: every combination is a row, whatever becomes of it, and a finished row is run once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from forking import forking_python
from hyperion_core.errors import ConfigError, HyperionError

from hyperion.comparison import runner
from hyperion.comparison.grid import make_grid, row_config
from hyperion.comparison.runner import compare
from hyperion.comparison.table import notes

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]
# In place of a row's process. `behaviour.json` beside the config says what each row does.
ROW = """
import json, os, pathlib, signal, sys, time
asked = json.loads(sys.argv[2])
folder, name = pathlib.Path(asked["folder"]), pathlib.Path(asked["folder"]).name
here = pathlib.Path(asked["config"]).parent
with (here / "ran.txt").open("a") as file: file.write(name + "\\n")
print("a line of its log", flush=True)
does = json.loads((here / "behaviour.json").read_text()).get(name, "done")
if does == "killed": os.kill(os.getpid(), signal.SIGKILL)
if does == "exits": sys.exit(3)
if does == "waits":
    (here / "waiting").touch()
    os.read(0, 1)
    (here / "stopped").touch()
    sys.exit(130)
if does == "failed": result = {"state": "failed", "error": "out of luck"}
else: result = {"state": "done", "base_bytes": 10**6, "perplexity_before": 9.0, "perplexity_after": 4.0,
    "tokens_per_second": 100.0, "peak_memory": 10**7, "seconds": 2.0, "evaluation_data": "tokens",
    "base": "weights", "data": "rows", "versions": {"torch": "2"}}
if does[0] == "{": result |= json.loads(does)
(folder / "result.json").write_text(json.dumps(result))
"""
GRID = {"quantization.method": ["rtn"], "quantization.bits": [4, 3, 2]}
COMMAND = "import typer; from hyperion.cli.compare import compare; a = typer.Typer(); a.command()(compare); a()"


@pytest.fixture
def folder(fake_dist: Any, tiny_model: Path, tmp_path: Path) -> Path:
    """With config.json, its data, and the template's quantizer installed as "rtn"."""
    source = (files("hyperion") / "plugin_templates" / "quantizer" / "plugin.py").read_text(encoding="utf-8")
    module = source.replace("changeme", "rtn").replace("Changeme", "Rtn")
    fake_dist("acme-rtn", {"hyperion.quantizers": {"rtn": "acme_rtn:RtnQuantizer"}}, {"acme_rtn": module})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    write_config(tmp_path, tiny_model)
    return tmp_path


def write_config(folder: Path, base: Path, **training: Any) -> None:
    config = {
        "base_model": str(base),
        "dtype": "float32",
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "quantization": {"method": "rtn", "group_size": 16},
        "dataset": {"dataset": "rows.jsonl", "validation_split": 8},
        "training": {"per_device_train_batch_size": 4, "max_steps": 4, "use_cpu": True, **training},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def behave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Rows do at once what they are told, and train nothing."""
    monkeypatch.setattr(runner, "_ROW", ROW)

    def told(**behaviour: str) -> None:
        named = {name.replace("_", "-").lstrip("-"): does for name, does in behaviour.items()}
        (folder / "behaviour.json").write_text(json.dumps(named))

    told()
    return told


def ran(folder: Path) -> list[str]:
    names = (folder / "ran.txt").read_text().split() if (folder / "ran.txt").exists() else []
    (folder / "ran.txt").unlink(missing_ok=True)
    return names


def test_a_grid_is_every_combination_once(folder: Path) -> None:
    grid = make_grid(folder / "config.json", {"quantization.method": ["none", "rtn"], "quantization.bits": [4, 5, 3]})
    assert [(row.values["quantization.method"], row.values["quantization.bits"]) for row in grid.rows] == [
        (None, None), ("rtn", 4), ("rtn", 5), ("rtn", 3)
    ]  # fmt: skip
    refused = [row for row in grid.rows if row.refused]
    assert len(refused) == 1 and "rtn cannot hold weights in 5 bits" in refused[0].refused
    assert grid.rows[1].steps == 4
    config = row_config(folder / "config.json", {"quantization.bits": 3, "adapter.r": 2, "training.seed": 7})
    assert (config.quantization.bits, config.quantization.group_size) == (3, 16)  # type: ignore[union-attr]
    assert (config.adapter.r, config.training.seed, config.training.max_steps) == (2, 7, 4)  # type: ignore[attr-defined]
    assert row_config(folder / "config.json", {"quantization.method": None}).quantization is None


def test_values_are_read_as_a_config_reads_them() -> None:
    from hyperion.cli.compare import _varied

    given = [
        "training.learning_rate=1e-4,2e-4",
        "quantization.method=none,rtn",
        "adapter={type: lora, r: 4},{type: ia3}",
    ]
    assert _varied(given) == {
        "training.learning_rate": [1e-4, 2e-4],
        "quantization.method": ["none", "rtn"],
        "adapter": [{"type": "lora", "r": 4}, {"type": "ia3"}],
    }
    for wrong in (["bits"], ["bits="], ["bits=4", "bits=3"], ["bits={4"]):
        with pytest.raises(HyperionError, match="--vary"):
            _varied(wrong)


@pytest.mark.parametrize(
    ("changes", "vary", "expected"),
    [
        ({"dataset": {"dataset": "rows.jsonl"}}, GRID, "set it to a share of the rows"),
        ({}, {"quantization.btis": [4, 3]}, 'did you mean "bits"'),
        ({}, {"quantization.bits": [5, 6]}, "rtn cannot hold weights in 5 bits"),
        ({"training": {"eval_strategy": "no"}}, GRID, "leave eval_strategy out"),
        ({"adapter": {"type": "lora", "rank": 3}}, GRID, "rank"),
    ],
)  # fmt: skip
def test_what_no_row_can_do_is_refused(changes: Any, vary: Any, expected: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError) as caught:
        compare(folder / "config.json", vary, output_dir=folder / "out")
    assert expected in str(caught.value) and not (folder / "out").exists()


def test_a_row_that_fails_or_crashes_loses_no_other_and_is_tried_again(folder: Path, behave: Any) -> None:
    behave(_1_rtn_4="failed", _2_rtn_3="killed")
    done = compare(folder / "config.json", GRID, output_dir=folder / "out")
    assert [result["state"] for result in done.results.values()] == ["failed", "failed", "done"]
    assert done.results["1-rtn-4"]["error"] == "out of luck"
    killed = done.results["2-rtn-3"]["error"]
    assert "SIGKILL" in killed and "out of memory" in killed and "a line of its log" in killed
    saved = json.loads((folder / "out/compare.json").read_text())["rows"]
    assert [row["state"] for row in saved] == ["failed", "failed", "done"]
    assert "out of luck" in (folder / "out/compare.md").read_text() and (folder / "out/compare.png").is_file()
    assert ran(folder) == ["1-rtn-4", "2-rtn-3", "3-rtn-2"]

    behave(_2_rtn_3="exits")
    done = compare(folder / "config.json", GRID, output_dir=folder / "out")
    assert ran(folder) == ["1-rtn-4", "2-rtn-3"], "what is finished is not run again"
    assert "exit code 3" in done.results["2-rtn-3"]["error"] and done.failed == ["2-rtn-3"]


def test_a_folder_belongs_to_one_grid(folder: Path, behave: Any) -> None:
    compare(folder / "config.json", GRID, output_dir=folder / "out")
    before = (folder / "out/compare.json").read_bytes()
    with pytest.raises(HyperionError, match="holds another comparison") as caught:
        compare(folder / "config.json", {**GRID, "quantization.bits": [4, 3]}, output_dir=folder / "out")
    assert "vary.quantization.bits: [4, 3, 2] then, [4, 3] now" in str(caught.value)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["learning_rate"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HyperionError, match=r"training\.learning_rate: 0\.0002 then, 0\.5 now"):
        compare(folder / "config.json", GRID, output_dir=folder / "out")
    assert (folder / "out/compare.json").read_bytes() == before
    with pytest.raises(HyperionError, match="is not empty"):
        compare(folder / "config.json", GRID, output_dir=folder)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"evaluation_data": "other"}, "not evaluated on the same tokens"),
        ({"base": "other"}, "one row and another the base model changed"),
        ({"data": "other"}, "one row and another the data changed"),
        ({"versions": {"torch": "3", "peft": "1"}}, "one row and another the code of torch changed"),
        ({"versions": {"torch": "2", "bitsandbytes": "1"}}, ""),
    ],
)
def test_rows_that_do_not_compare_are_told(figures: dict[str, Any], says: str, folder: Path, behave: Any) -> None:
    behave(_2_rtn_3=json.dumps(figures))
    compare(folder / "config.json", GRID, output_dir=folder / "out")
    text = (folder / "out/compare.md").read_text()
    assert says in text if says else "Careful" not in text


def test_a_varied_base_model_is_no_surprise(folder: Path, behave: Any) -> None:
    grid = make_grid(
        folder / "config.json", {"base_model": [json.loads((folder / "config.json").read_text())["base_model"]]}
    )
    rows = {name: {"state": "done", "base": name} for name in ("one", "other")}
    assert not any("Careful" in note for note in notes(grid, rows))


def test_a_row_that_was_killed_before_its_manifest_starts_again(folder: Path, tiny_model: Path, rows_fork: str) -> None:
    """Without checkpoints there is nothing to go on from, and its folder is not empty."""
    write_config(folder, tiny_model, save_strategy="no")
    grid = {"quantization.method": [None]}
    first = compare(folder / "config.json", grid, output_dir=folder / "out")
    assert first.results["1-none"]["state"] == "done", first.results
    for name in ("result.json", "run/hyperion.json"):
        (folder / "out/1-none" / name).unlink()
    again = compare(folder / "config.json", grid, output_dir=folder / "out")
    assert again.results["1-none"]["state"] == "done", again.results
    for figure in ("base", "data", "versions", "evaluation_data", "perplexity_before"):
        assert again.results["1-none"][figure] == first.results["1-none"][figure] is not None, figure


def heeding_ctrl_c() -> None:
    """What is started by a job in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def rows_fork(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows are forked from a process that has imported what they need. Gives what starts them."""
    monkeypatch.setattr(sys, "executable", str(forking_python(tmp_path_factory.mktemp("forking"))))
    return sys.executable


def start(folder: Path, *vary: str, code: str = "") -> subprocess.Popen[str]:
    options = [part for each in vary for part in ("--vary", each)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", code + COMMAND, "config.json", *options, "-o", "out"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=None if sys.platform == "win32" else heeding_ctrl_c,
    )  # fmt: skip


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if found():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal for a process")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_row_and_says_how_to_go_on(signum: int, folder: Path) -> None:
    names = ["1-4-rtn", "2-3-rtn", "3-2-rtn"]
    (folder / "behaviour.json").write_text(json.dumps({names[1]: "waits"}))
    code = f"from hyperion.comparison import runner; runner._ROW = {ROW!r}; "
    process = start(folder, "quantization.bits=4,3,2", "quantization.method=rtn", code=code)
    wait_for(lambda: (folder / "waiting").exists(), process)
    process.send_signal(signum)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, stderr
    assert "the same command goes on from here" in stderr and (folder / "stopped").exists()
    assert ran(folder) == names[:2] and not (folder / "out" / names[1] / "result.json").exists()


@pytest.mark.slow
def test_rows_train_resume_and_measure(folder: Path, tiny_model: Path, rows_fork: str) -> None:
    import math

    import torch

    from hyperion.data import DatasetProcessor
    from hyperion.data.encoding import Encoder
    from hyperion.models.load import load_model, load_tokenizer

    write_config(folder, tiny_model, max_steps=60, save_steps=5, logging_steps=1, learning_rate=1e-2, eval_steps=30)
    process = start(folder, "quantization.method=none,rtn")
    log = folder / "out/1-none/run/metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 7,' in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, process.communicate()
    assert not (folder / "out/1-none/result.json").exists()
    checkpoints = sorted((folder / "out/1-none/run").glob("checkpoint-*"))
    assert checkpoints, "the row has written one when it was asked to end"

    process = start(folder, "quantization.method=none,rtn")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stdout + stderr + (folder / "out/1-none/log.txt").read_text()
    assert (folder / "out/1-none/run/resumed.jsonl").is_file()
    none, rtn = json.loads((folder / "out/compare.json").read_text())["rows"]
    assert none["base_bytes"] > 4 * 32096 > 1.5 * rtn["base_bytes"]
    assert none["perplexity_after"] < none["perplexity_before"] and rtn["tokens_per_second"] > 0
    assert none["perplexity_before"] != rtn["perplexity_before"] and rtn["peak_memory"] > 10**8

    # The base's own perplexity, worked out here on the rows that the run held out.
    _, held_out = DatasetProcessor(folder / "rows.jsonl", validation_split=8).prepare()
    model, tokenizer = load_model(tiny_model, dtype="float32", device="cpu"), load_tokenizer(tiny_model)
    bos, total, count = Encoder(tokenizer).bos_id, 0.0, 0
    for row in held_out:
        texts = [segment["text"] for segment in row["segments"]]
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        prompt, answer = [*([] if bos is None else [bos]), *prompt], [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert none["perplexity_before"] == pytest.approx(math.exp(total / count), rel=1e-4)
