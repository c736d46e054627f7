"""What pip is told about our distributions, and what it made of it."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FRAMEWORK = "hyperion-ft"
APACHE = {"hyperion-core"}
EXTRAS = ("bnb", "gptq", "torchao")
FOLDERS = {
    FRAMEWORK: ROOT,
    **{
        project.parent.name.replace("_", "-"): project.parent
        for pattern in ("hyperion_*/pyproject.toml", "plugins/hyperion_*/pyproject.toml")
        for project in ROOT.glob(pattern)
    },
}


def requirements(name: str, extra: str = "") -> list[Requirement]:
    """What the installed distribution asks for."""
    found = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": extra})]


def is_ours(requirement: Requirement) -> bool:
    return canonicalize_name(requirement.name).split("-")[0] == "hyperion"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Wheel and source archive of every distribution, as a release has them."""
    found = {}
    for name, source in FOLDERS.items():
        folder = tmp_path_factory.mktemp(name)
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
            cwd=source,
            env={**os.environ, "HYPERION_RELEASE": "1"},
            check=True,
            capture_output=True,
        )
        found[name] = (next(folder.glob("*.whl")), next(folder.glob("*.tar.gz")))
    return found


def source_of(name: str) -> Path:
    """The folder that holds a distribution's package."""
    return FOLDERS[name] / "hyperion" / "src" if name == FRAMEWORK else FOLDERS[name] / "src"


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(file))


@pytest.fixture(scope="module")
def released(built: dict[str, tuple[Path, Path]]) -> email.message.Message:
    """METADATA of the framework's wheel."""
    return metadata_of(built[FRAMEWORK][0])


def test_every_distribution_of_ours_was_installed_from_this_checkout() -> None:
    installed = {
        canonicalize_name(item.metadata["Name"])
        for item in importlib.metadata.distributions()
        if canonicalize_name(item.metadata["Name"]).startswith("hyperion")
    }
    assert set(FOLDERS) <= installed
    for name in FOLDERS:
        direct = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "null")
        assert direct is not None, f"{name} came from an index"
        assert direct["url"] == FOLDERS[name].as_uri()


def test_the_checkout_satisfies_what_its_distributions_ask_of_each_other() -> None:
    extras = {name: ["dev", *(EXTRAS if name == FRAMEWORK else ())] for name in FOLDERS}
    asked = [(name, item) for name in FOLDERS for extra in extras[name] for item in requirements(name, extra)
             if is_ours(item)]  # fmt: skip
    assert {item.name for _, item in asked} == set(FOLDERS) - {FRAMEWORK}, "base and extras are all that is here"
    for name, item in asked:
        assert canonicalize_name(item.name) in FOLDERS, f"{name} asks for {item}, and pip would ask an index for it"
        version = importlib.metadata.version(item.name)
        assert item.specifier.contains(version), f"{name} asks for {item}, and {version} is here"
        assert (item.url is not None) == (name == FRAMEWORK), f"{name}: links stand in the framework alone"


def test_a_released_wheel_asks_for_versions_and_carries_no_link(released: email.message.Message) -> None:
    assert "file:" not in released.as_string()
    asked = [Requirement(text) for text in released.get_all("Requires-Dist") or []]
    here = [Requirement(text) for text in importlib.metadata.requires(FRAMEWORK) or []]
    assert [(item.name, item.extras, str(item.marker)) for item in asked] == [
        (item.name, item.extras, str(item.marker)) for item in here
    ]
    for item in filter(is_ours, asked):
        assert item.url is None
        assert item.specifier.contains(importlib.metadata.version(item.name))
        assert not item.specifier.contains("99"), f"{item} takes any later version"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_holds_its_package_whole_and_nothing_else(name: str, built: dict[str, tuple[Path, Path]]) -> None:
    wheel, _ = built[name]
    source = source_of(name)
    package = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
    with zipfile.ZipFile(wheel) as archive:
        inside = {file for file in archive.namelist() if ".dist-info/" not in file}
        beside = {file.split(".dist-info/")[1]: file for file in archive.namelist() if ".dist-info/" in file}
        licence = archive.read(beside["licenses/LICENSE"]).decode()
        entry_points = archive.read(beside["entry_points.txt"]).decode() if "entry_points.txt" in beside else ""
    assert inside == {file for file in package if "__pycache__" not in file and "_cache/" not in file}
    top = {file.split("/")[0] for file in inside}
    assert top == {"hyperion" if name == FRAMEWORK else name.replace("-", "_")}, "one package a distribution"
    assert all(f"{package}/py.typed" in inside for package in top)
    assert ("Apache License" if name in APACHE else "GNU AFFERO") in licence
    for entry_point in importlib.metadata.distribution(name).entry_points:
        assert f"{entry_point.name} = {entry_point.value}" in entry_points


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_says_what_was_built_and_links_to_nothing(name: str, built: dict[str, tuple[Path, Path]]) -> None:
    wheel, _ = built[name]
    metadata = metadata_of(wheel)
    assert canonicalize_name(metadata["Name"]) == name
    code = (source_of(name) / name.replace("-", "_").replace("hyperion_ft", "hyperion") / "__init__.py").read_text()
    written = re.search(r'^__version__ = "(.+)"$', code, re.MULTILINE)
    assert metadata["Version"] == (written[1] if written else importlib.metadata.version(name))
    for text in metadata.get_all("Requires-Dist") or []:
        assert Requirement(text).url is None, f"{name} asks for {text}"
    assert "file:" not in metadata.as_string()
    assert str(ROOT) not in metadata.as_string()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_source_archive_has_what_a_build_needs(name: str, built: dict[str, tuple[Path, Path]]) -> None:
    _, archive = built[name]
    with tarfile.open(archive) as files:
        names = {file.partition("/")[2] for file in files.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    package = source_of(name).relative_to(FOLDERS[name]).as_posix()
    assert any(file.startswith(f"{package}/") and file.endswith("/py.typed") for file in names)
    assert not [
        file for file in names if "_cache" in file or "__pycache__" in file or file.startswith((".git/", ".nox"))
    ]


@pytest.mark.parametrize("name", FOLDERS)
def test_licence_and_lock_are_in_the_metadata(name: str) -> None:
    metadata = importlib.metadata.metadata(name)
    licence, title = ("Apache-2.0", "Apache License") if name in APACHE else ("AGPL-3.0-or-later", "GNU AFFERO")
    assert metadata["License-Expression"] == licence
    assert title in (FOLDERS[name] / "LICENSE").read_text(encoding="utf-8")
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert "Private :: Do Not Upload" in (metadata.get_all("Classifier") or [])
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.parametrize("name", FOLDERS)
def test_every_library_that_is_imported_is_asked_for(name: str) -> None:
    owners = importlib.metadata.packages_distributions()
    asked = {canonicalize_name(item.name) for item in requirements(name)}
    if name != FRAMEWORK:  # a plugin may use what the core, or another plugin that it builds on, brings along
        ours = {item.name for item in requirements(name) if is_ours(item)}
        asked |= {canonicalize_name(item.name) for owner in ours for item in requirements(owner)}
    for file in source_of(name).rglob("*.py"):
        if "testing" in file.parts:  # the conformance kit, which runs where the framework does
            continue
        for module in _imported(ast.parse(file.read_text(encoding="utf-8"))):
            found = {canonicalize_name(owner) for owner in owners.get(module, [])}
            assert not found or found & (asked | {name}), f"{file.relative_to(ROOT)} imports {module}: ask for {found}"


def _imported(tree: ast.Module) -> set[str]:
    """Top-level names of the modules that run-time code imports."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_each_pin_lies_in_the_ranges_that_are_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    names = {canonicalize_name(pin.name) for pin in pins}
    for name in FOLDERS:
        for item in requirements(name, "dev" if name == FRAMEWORK else "testing"):
            if is_ours(item):
                continue
            assert canonicalize_name(item.name) in names, f"{name} asks for {item}, which has no pin"
            for pin in pins:
                if canonicalize_name(pin.name) == canonicalize_name(item.name):
                    (exact,) = pin.specifier
                    assert exact.operator == "=="
                    assert item.specifier.contains(exact.version), f"{name} asks for {item}, and the pin is {pin}"
