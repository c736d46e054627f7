"""The `hyperion` command, as a user types it: light, friendly, exit code 2 for what the user can mend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = """
import sys
sys.argv = ["hyperion", *{arguments!r}]
from hyperion.cli.main import run
try:
    run()
except SystemExit as stop:
    code = stop.code
heavy = sorted({{"torch", "transformers", "peft", "datasets", "accelerate", "pyarrow"}} & set(sys.modules))
print("HEAVY", heavy, "CODE", code or 0)
"""


def config_file(folder: Path, base: Path, **changes: object) -> Path:
    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n} is", "completion": f" {n}"}) for n in range(10)), encoding="utf-8"
    )
    config = {
        "base_model": str(base),
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "dataset": {"dataset": "rows.jsonl", "validation_split": 2},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_samples": 1},
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "command", ["--help", "validate", "plugins list", "plugins info lora", "plugins doctor lora", "schema"]
)
def test_it_answers_without_importing_anything_heavy(command: str, tiny_model: Path, tmp_path: Path) -> None:
    arguments = command.split()
    if command == "validate":
        arguments.append(str(config_file(tmp_path, tiny_model)))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1:] == ["HEAVY [] CODE 0"], done.stdout[-2000:] + done.stderr


def test_validate_prints_the_plan(cli, tiny_model: Path, tmp_path: Path) -> None:
    done = cli("validate", config_file(tmp_path, tiny_model))
    assert done.code == 0, done.stderr
    for expected in ("lora  (hyperion-adapters-lora 0.1.0", "4 modules: q_proj, v_proj", "8 rows + 2 to evaluate on",
                     "gradient clipping", "norm 1", "about ", "parameters", "dtype", "device"):  # fmt: skip
        assert expected in done.stdout
    steps = next(line for line in done.stdout.splitlines() if line.startswith("steps"))
    assert steps.split()[-1] == "4"
    assert "trust_remote_code" not in done.stdout


def test_validate_says_what_it_cannot_know_of_a_model_on_the_hub(cli, tmp_path: Path) -> None:
    done = cli("validate", config_file(tmp_path, Path("owner/model"), trust_remote_code=True))
    assert done.code == 0, done.stderr
    assert "unknown: the model is not local" in done.stdout
    assert "trust_remote_code" in done.stdout


def test_a_target_that_matches_nothing_names_the_modules_that_exist(cli, tiny_model: Path, tmp_path: Path) -> None:
    path = config_file(tmp_path, tiny_model, adapter={"type": "lora", "target_modules": ["query"]})
    done = cli("validate", path)
    assert done.code == 2
    assert "q_proj" in done.stderr
    assert "config.json:" in done.stderr


def test_errors_go_to_stderr_with_code_2_and_leave_nothing(cli, tmp_path: Path) -> None:
    done = cli("train", "none.yaml", "--output_dir", "out")
    assert done.code == 2
    assert "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_folder_that_is_taken(cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    done = cli("train", config_file(tmp_path, tiny_model), "--output_dir", "out")
    assert done.code == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_train_without_network_says_what_to_do(cli, tmp_path: Path) -> None:
    done = cli("train", config_file(tmp_path, Path("owner/model")), "--output_dir", "out")
    assert done.code == 2
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr


def test_plugins_list_as_json_tells_whose_each_is(cli) -> None:
    rows = json.loads(cli("plugins", "list", "--json").stdout)
    lora = next(row for row in rows if row["kind"] == "adapter" and row["name"] == "lora")
    assert lora["distribution"] == "hyperion-adapters-lora"
    assert lora["state"] == "ok"
    assert {"kind", "name", "distribution", "version", "origin", "state"} == lora.keys()
    assert {"lora", "ia3", "sft", "cosine"} <= {row["name"] for row in rows}


def test_plugins_list_shows_a_broken_neighbour_and_does_not_import_it(cli, fake_dist) -> None:
    fake_dist(
        "broken", {"hyperion.adapters": {"broken": "broken_adapter:X"}}, {"broken_adapter": "raise SystemExit(9)"}
    )
    fake_dist("old", {"hyperion.adapters": {"old": "old:X"}}, {"old": ""}, requires=["hyperion-core<1"])
    done = cli("plugins", "list")
    assert done.code == 0, done.stderr
    assert "wrong contract" in next(line for line in done.stdout.splitlines() if " old " in line)
    assert "broken" in done.stdout


def test_schema_is_written_to_a_file(cli, tmp_path: Path) -> None:
    done = cli("schema", "--output", "schema.json")
    assert done.code == 0, done.stderr
    assert "adapter:lora" in json.loads((tmp_path / "schema.json").read_text())["$defs"]
    assert cli("schema", "--output", "no/such/folder.json").code == 2


def test_train_leaves_a_complete_artifact(cli, tiny_model: Path, tmp_path: Path) -> None:
    from hyperion_core.artifact import Artifact

    done = cli("train", config_file(tmp_path, tiny_model), "--output_dir", "out")
    assert done.code == 0, done.stderr
    out = tmp_path / "out"
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter.json", "plan.json", "README.md",
                 "metrics.jsonl", "loss.png", "samples.jsonl", "tokenizer.json", "hyperion.json"):  # fmt: skip
        assert (out / name).is_file(), f"{name} is missing"
    artifact = Artifact.read(out)
    assert artifact.changed_files() == []
    assert artifact.metrics["eval_loss"] > 0
    assert {
        "hyperion-core",
        "hyperion-adapters-lora",
        "torch",
        "transformers",
        "peft",
        "python",
    } <= artifact.versions.keys()
    assert "sha256" in json.dumps(artifact.data)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert "eval_loss" in card
    (out / "adapter_model.safetensors").write_bytes(b"")
    assert artifact.changed_files() == ["adapter_model.safetensors"]


INTERRUPTED = """
import sys
from pathlib import Path
from hyperion.cli.main import run
from hyperion.trainer import Trainer
def train(self, output_dir, **rest):
    Path(output_dir, {made!r}).mkdir(parents=True)
    raise KeyboardInterrupt
Trainer.train = train
sys.argv = ["hyperion", "train", {config!r}, "--output_dir", "out"]
run()
"""


@pytest.mark.parametrize(
    "made, says",
    [("checkpoint-4", "config.json --output_dir out --resume\n"), ("", "begin again: hyperion train")],
    ids=["with a checkpoint", "before the first"],
)
def test_ctrl_c_says_how_to_go_on(made: str, says: str, tiny_model: Path, tmp_path: Path) -> None:
    code = INTERRUPTED.format(made=made, config=str(config_file(tmp_path, tiny_model)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_not_resumed_and_a_changed_config_is_named(cli, tiny_model: Path, tmp_path: Path) -> None:
    path = config_file(tmp_path, tiny_model)
    assert cli("train", path, "--output_dir", "out").code == 0
    again = cli("train", path, "--output_dir", "out", "--resume")
    assert again.code == 2
    assert "is finished" in again.stderr
    (tmp_path / "out/hyperion.json").unlink()
    changed = json.loads(path.read_text())
    changed["training"]["learning_rate"] = 0.5
    path.write_text(json.dumps(changed))
    other = cli("train", path, "--output_dir", "out", "--resume")
    assert other.code == 2
    assert "training.learning_rate: 0.0002 then, 0.5 now" in other.stderr
