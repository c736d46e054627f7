"""`hyperion plugins new`: what it writes installs, passes its own tests, and trains; what it refuses leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hyperion_core.errors import HyperionError
from hyperion_core.kinds import KINDS

from hyperion import new_plugin as subject
from hyperion.new_plugin import TEMPLATE_OF, new_plugin, write

NAME = "own-method"
LONG = "abcdefghi-" * 3 + "abcdefghij"


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What it printed; the test fails with that when the command does."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A repository of each kind, written by the command itself."""
    root = tmp_path_factory.mktemp("generated")
    for kind in TEMPLATE_OF:
        run("hyperion", "plugins", "new", kind, NAME, cwd=root)
    return {kind: root / f"hyperion-{kind}-{NAME}" for kind in TEMPLATE_OF}


@pytest.fixture(scope="module")
def installed(generated: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which all of them are installed, beside what is; the running one is not touched."""
    target = tmp_path_factory.mktemp("installed")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run("pip", "install", "--quiet", *offline, "--target", target, *generated.values(), cwd=target)
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {"PYTHONPATH": os.pathsep.join([str(target), *map(os.path.abspath, given)])}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEMPLATE_OF)
def test_it_passes_its_own_tests_as_generated(kind: str, generated: dict[str, Path], installed: dict[str, str]) -> None:
    said = run("pytest", "-v", "-p", "no:cacheprovider", cwd=generated[kind], env=installed)
    checks = "test_the_config_names_its_plugin", "test_importing_the_plugin_is_light"
    lacking = [check for check in checks if f"{check} PASSED" not in said]
    assert not lacking, f"the conformance suite is not what ran:\n{said}"


@pytest.mark.slow
def test_they_are_listed_and_train_together(installed: dict[str, str], cli, tiny_model: Path, tmp_path: Path) -> None:
    listed = cli("plugins", "list", "--json", env=installed)
    mine = {row["kind"]: row for row in json.loads(listed.stdout) if row["name"] == NAME}
    assert {kind: (row["distribution"], row["state"]) for kind, row in mine.items()} == {
        kind: (f"hyperion-{kind}-{NAME}", "ok") for kind in TEMPLATE_OF
    }
    examined = cli("plugins", "doctor", env=installed)
    assert examined.code == 0 and f"hyperion-deploy-target-{NAME}" in examined.stdout, examined.stdout

    rows = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    training = {"num_train_epochs": 6, "per_device_train_batch_size": 6, "learning_rate": 0.05, "logging_steps": 1}
    config = {
        "base_model": str(tiny_model),
        "dtype": "float32",
        "adapter": {"type": NAME, "r": 4},
        "quantization": {"method": NAME, "bits": 4, "group_size": 16},
        "dataset": {"dataset": "rows.jsonl"},
        "training": {**training, "lr_scheduler": {"type": NAME, "power": 1.0, "floor": 0.5}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    trained = cli("train", "config.yaml", "--output_dir", "out", env=installed)
    assert trained.code == 0, trained.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert min(rates) >= 0.5 * max(rates) > 0, f"the schedule's floor is not kept: {rates}"
    adapter = json.loads((tmp_path / "out/adapter.json").read_text())
    assert (adapter["type"], adapter["distribution"]) == (NAME, f"hyperion-adapter-{NAME}")


@pytest.mark.parametrize("kind", TEMPLATE_OF)
@pytest.mark.parametrize("name", ["x", NAME, LONG])
def test_what_is_generated_is_clean_and_complete(kind: str, name: str, tmp_path: Path) -> None:
    plugin = new_plugin(kind, name, tmp_path / "repository")
    write(plugin)
    files = {path.relative_to(plugin.folder).as_posix(): path for path in plugin.folder.rglob("*") if path.is_file()}
    assert set(files) == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".gitignore",
        ".github/workflows/tests.yml",
        plugin.module.as_posix(),
        plugin.module.with_name("py.typed").as_posix(),
        plugin.test.as_posix(),
    }
    for name, path in files.items():
        assert "changeme" not in path.read_text(encoding="utf-8").lower(), f"{name} holds a word of the template"
    run("ruff", "check", "--no-cache", ".", cwd=plugin.folder)
    workflow = yaml.safe_load(files[".github/workflows/tests.yml"].read_text(encoding="utf-8"))
    assert any("pytest" in step.get("run", "") for step in workflow["jobs"]["tests"]["steps"])
    assert "Apache License" in files["LICENSE"].read_text(encoding="utf-8")
    code = files[plugin.module.as_posix()].read_text(encoding="utf-8")
    assert "import hyperion\n" not in code and "from hyperion " not in code, "a plugin stands on the contract alone"


REFUSED = {
    ("adaptor", "mine"): 'did you mean "adapter"?',
    ("tracker", "mine"): "begin with one of them",
    ("adapter", "Mine"): "for example: mine",
    ("adapter", "../mine"): "for example: mine",
    ("adapter", "my--method"): "for example: my-method",
    ("adapter", "4bit-v2"): "for example: bit-v2",
    ("adapter", ""): "for example: my-adapter",
    ("adapter", "méthode"): "for example: methode",
    ("adapter", LONG + "k"): f"for example: {LONG}",
    ("adapter", "lambda"): "for example: my-lambda",
    ("adapter", "null"): "for example: my-null",
    ("adapter", "lora"): "choose another name, for example: my-lora",
}


@pytest.mark.parametrize("kind, name", REFUSED)
def test_what_cannot_be_written_is_refused_with_what_to_do(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HyperionError) as caught:
        new_plugin(kind, name)
    assert REFUSED[kind, name] in caught.value.fix and caught.value.why
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kind.kind for kind in KINDS if kind.kind not in TEMPLATE_OF])
def test_a_kind_without_a_template_is_told_which_have_one(kind: str) -> None:
    with pytest.raises(HyperionError, match=f"no template for an? {kind}") as caught:
        new_plugin(kind, "mine")
    assert all(offered in caught.value.why for offered in TEMPLATE_OF)


def test_nothing_is_overwritten_and_nothing_half_written(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    refused = cli("plugins", "new", "adapter", "mine", "--folder", "there")
    assert refused.code == 2 and "there exists already" in refused.stderr and "fix: " in refused.stderr
    assert "Traceback" not in refused.stderr
    with pytest.raises(HyperionError, match="is no folder"):
        new_plugin("adapter", "mine", tmp_path / "nowhere" / "mine")

    written: list[Path] = []

    def full(path: Path, *arguments: object, **options: object) -> int:
        if written:
            raise OSError(28, "No space left on device")
        path.touch()
        written.append(path)
        return 0

    plugin = new_plugin("adapter", "mine", tmp_path / "mine")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HyperionError, match="mine cannot be written") as caught:
        write(plugin)
    assert caught.value.why == "No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert written


def test_words_of_the_template_are_replaced_once_and_not_evaluated() -> None:
    words = {"changeme": "changeme_package", "changeme_package": "{{ 7*7 }} $x"}
    assert subject._fill("changeme_package changeme $HOME {x}", words) == "{{ 7*7 }} $x changeme_package $HOME {x}"
