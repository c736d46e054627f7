"""The conformance kit's fixtures, used as a plugin author uses them."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import sys

import hyperion_core.testing
import pytest
from hyperion_core.registry import registry as registry_in_use
from hyperion_core.testing.fixtures import FakeDistributions

NAMES = {"hyperion.schedulers": {"warm": "acme_warm:Warm"}}
SOURCE = """
    from hyperion_core.kinds import Scheduler

    class Warm(Scheduler):
        def scheduler_build(self): return "warm"
"""


def test_a_fake_distribution_is_a_real_one(fake_dist):
    folder = fake_dist("acme-warm", NAMES, {"acme_warm": SOURCE}, version="2.5")
    found = importlib.metadata.distribution("acme-warm")
    assert (found.version, found.requires) == ("2.5", ["hyperion-core>=1,<2"])
    recorded = {str(file): file for file in found.files}
    assert set(recorded) == {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    content = (folder / "acme_warm.py").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    recording = recorded["acme_warm.py"]
    assert (recording.hash.mode, recording.hash.value, recording.size) == ("sha256", digest, len(content))

    assert [entry.name for entry in registry_in_use().entries("scheduler") if entry.whose == "acme-warm 2.5"] == [
        "warm"
    ]
    assert registry_in_use().load("scheduler", "acme-warm:warm").__name__ == "Warm"
    assert fake_dist.imported() == ["acme_warm"]


def test_nothing_of_it_is_left_afterwards():
    assert "acme_warm" not in sys.modules
    assert not any("acme-warm" in entry for entry in sys.path)
    assert not any(entry.distribution == "acme-warm" for entry in registry_in_use().entries())
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("acme-warm")


def test_the_registry_fixture_sees_only_what_the_test_gives(registry):
    assert registry_in_use() is registry and registry.entries() == []


def test_the_cli_fixture_runs_the_command_and_sees_the_fakes(fake_dist, cli, tmp_path):
    main = """
        import os, sys
        from hyperion_core.registry import registry
        print(os.getcwd(), sys.argv[1:], [e.name for e in registry().entries() if e.distribution == "acme-warm"])
        print(os.environ["NO_COLOR"], os.environ.get("MORE"), file=sys.stderr)
        sys.exit(3)
    """
    fake_dist("a-stand-in", {}, {"hyperion/__init__.py": "", "hyperion/__main__.py": main})
    fake_dist("acme-warm", NAMES, {"acme_warm": SOURCE})
    result = cli("plugins", tmp_path / "x", env={"MORE": "yes"})
    assert (result.code, result.stderr.split()) == (3, ["1", "yes"])
    assert result.stdout.strip() == f"{tmp_path} {['plugins', str(tmp_path / 'x')]} ['warm']"


def test_the_suites_are_there_by_name():
    assert hyperion_core.testing.SchedulerConformance.kind == "scheduler"
    assert set(dir(hyperion_core.testing)) == set(hyperion_core.testing.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'NoConformance'"):
        _ = hyperion_core.testing.NoConformance


def test_the_tiny_model_is_a_loadable_base(request):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue("tiny_model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama" and model.num_parameters() < 1_000_000
    batch = tokenizer(["hello world"], return_tensors="pt")
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_fakes_can_stand_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    fakes = FakeDistributions(tmp_path)
    folder = fakes("plain", {}, {"plain_package/__init__.py": "x = 1"}, requires=())
    assert str(folder) == sys.path[0] and fakes.registry().entries() == []
    assert importlib.metadata.distribution("plain").requires is None
