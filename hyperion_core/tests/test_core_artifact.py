"""An artifact is whole or it is none, and can be checked."""

from __future__ import annotations

import json

import pytest
from hyperion_core.artifact import ADAPTER, MANIFEST, Artifact, read_json, sha256, write_json
from hyperion_core.errors import ArtifactError


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "sub").mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "sub" / "tokenizer.json").write_text("{}")
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"state")
    (folder / ".cache").write_text("scratch")
    write_json(folder / ADAPTER, {"type": "lora", "config": {"r": 8}})
    return Artifact(
        folder, {"type": "lora"}, metrics={"loss": 0.5}, versions={"peft": "1"}, data={"train": "abc"}
    ).seal()


def test_what_was_sealed_is_read(sealed):
    read = Artifact.read(str(sealed.folder))
    assert read.adapter == {"type": "lora", "config": {"r": 8}}
    assert (read.metrics, read.versions, read.data) == ({"loss": 0.5}, {"peft": "1"}, {"train": "abc"})
    assert read.changed_files() == []


def test_the_manifest_lists_every_file_but_checkpoints_and_hidden_ones(sealed):
    files = read_json(sealed.folder / MANIFEST)["files"]
    assert set(files) == {"adapter.json", "adapter_model.safetensors", "sub/tokenizer.json"}
    assert files["adapter_model.safetensors"] == sha256(sealed.folder / "adapter_model.safetensors")
    assert sha256(sealed.folder / "adapter_model.safetensors").startswith("9a1290")


def test_hashing_tells_how_far_it_is(tmp_path):
    file, blocks = tmp_path / "weights", []
    file.write_bytes(b"w" * (2**20 + 1))
    assert sha256(file, blocks.append) == sha256(file)
    assert blocks == [2**20, 1]


def test_changed_and_missing_files_are_named(sealed):
    (sealed.folder / "adapter_model.safetensors").write_bytes(b"Weights")
    (sealed.folder / "sub" / "tokenizer.json").unlink()
    (sealed.folder / "notes.txt").write_text("a file of the user's own is no change")
    assert sealed.changed_files() == ["adapter_model.safetensors", "sub/tokenizer.json"]


@pytest.mark.parametrize("missing", [MANIFEST, ADAPTER])
def test_a_half_written_artifact_is_none(sealed, missing):
    (sealed.folder / missing).unlink()
    with pytest.raises(ArtifactError, match=f"no finished artifact: it has no {missing}") as caught:
        Artifact.read(sealed.folder)
    assert "resume the run" in caught.value.fix


def test_a_later_format_is_refused(sealed):
    manifest = read_json(sealed.folder / MANIFEST)
    write_json(sealed.folder / MANIFEST, {**manifest, "format": 99})
    with pytest.raises(ArtifactError, match="artifact format 99") as caught:
        Artifact.read(sealed.folder)
    assert caught.value.why == "this version reads format 1"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(sealed, content):
    (sealed.folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        Artifact.read(sealed.folder)
    assert caught.value.why and caught.value.fix


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"smile": "😀"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"smile": "😀"}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert read_json(path) == {"smile": "😀"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
