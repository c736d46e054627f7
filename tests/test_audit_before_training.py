"""The audit stands before every training and behind a command of its own, and a config's chat template is in force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hyperion_core.artifact import Artifact

from hyperion import FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor
from hyperion.data.audit import CHECKS, AuditError

TEMPLATE = "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant> {% endif %}"


def config_file(folder: Path, base: Path, rows: list[dict], dataset: dict | None = None, **changes: object) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    config = {
        "base_model": str(base),
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj"]},
        "dataset": {"dataset": "rows.jsonl", **(dataset or {})},
        "training": {"max_steps": 1, "max_length": 64, "per_device_train_batch_size": 2},
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def clean(count: int = 12) -> list[dict]:
    return [{"prompt": f"{n} is", "completion": f" {n}"} for n in range(count)]


def repeated() -> list[dict]:
    return [{"prompt": "1 is", "completion": " 1"}] * 120


def test_command_says_what_it_found_and_how_it_ended(cli, tiny_model: Path, tmp_path: Path) -> None:
    done = cli("data", "audit", config_file(tmp_path, tiny_model, clean()))
    assert done.code == 0, done.stderr
    assert "audit: " in done.stdout and " checks passed" in done.stdout
    done = cli("data", "audit", config_file(tmp_path, tiny_model, repeated()))
    assert done.code == 2 and "duplicates: " in done.stderr and "119 of 120" in done.stderr
    done = cli("data", "audit", tmp_path / "config.json", "--json")
    told = json.loads(done.stdout)
    assert done.code == 2 and not told["passed"]
    assert {finding["name"] for finding in told["findings"]} <= set(CHECKS)


def test_training_is_refused_before_the_weights_are_loaded(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    from hyperion import pipeline

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(pipeline, "load_base", never)
    config = FinetuneConfig.from_file(config_file(tmp_path, tiny_model, repeated()))
    with pytest.raises(AuditError, match="119 of 120"):
        Trainer(config).train(output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rows = DatasetProcessor(repeated()).prepare()[0]
    with pytest.raises(AuditError, match="119 of 120"):
        Trainer(config).train(rows, output_dir=tmp_path / "out")


def test_what_is_allowed_is_trained_with_a_warning_and_recorded(tiny_model: Path, tmp_path: Path, caplog) -> None:
    path = config_file(tmp_path, tiny_model, repeated(), audit={"allow": ["duplicates"]})
    with caplog.at_level("INFO", logger="hyperion"):
        Trainer(FinetuneConfig.from_file(path)).train(output_dir=tmp_path / "out")
    assert "audit warns: duplicates" in caplog.text and "checks passed, 1 warning" in caplog.text
    kept = {finding["name"]: finding for finding in Artifact.read(tmp_path / "out").data["audit"]["findings"]}
    assert kept["duplicates"]["state"] == "warned" and kept["duplicates"]["counts"]["repeated"] == 119


def test_a_configs_chat_template_is_in_force_and_saved(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    chats = {"format": "chat", "chat_template": "own.jinja"}
    path = config_file(tmp_path, tiny_model, clean(), chats, audit={"allow": ["chat_template"]})
    Trainer(FinetuneConfig.from_file(path)).train(output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{% for m in messages %}\n{{ m['content'] }\n{% endfor %}", "line 2"),
        ("absent.jinja", "absent.jinja cannot be read"),
        ("{{ text }}", "reads no messages"),
    ],
)
def test_a_chat_template_that_is_none_is_refused_while_validating(cli, tiny_model: Path, tmp_path: Path, given, told):
    done = cli("validate", config_file(tmp_path, tiny_model, clean(), {"format": "chat", "chat_template": given}))
    assert done.code == 2 and "dataset.chat_template" in done.stderr and told in done.stderr


def test_a_chat_template_for_rows_that_have_none_is_refused(cli, tiny_model: Path, tmp_path: Path) -> None:
    done = cli("validate", config_file(tmp_path, tiny_model, clean(), {"chat_template": TEMPLATE}))
    assert done.code == 2 and "has no effect on completion rows" in done.stderr
