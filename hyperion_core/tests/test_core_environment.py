"""What surrounds the plugins: whose `hyperion` it is, copies, versions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hyperion_core import environment
from hyperion_core.distributions import unreadable_distributions
from hyperion_core.environment import environment_findings


@pytest.fixture(autouse=True)
def no_hyperion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if `hyperion` was not imported yet, in an empty working directory."""
    monkeypatch.delitem(sys.modules, "hyperion", raising=False)
    monkeypatch.chdir(tmp_path)


def told(text: str) -> list[environment.Finding]:
    return [finding for finding in environment_findings() if text in finding.what]


def test_another_project_called_hyperion_is_found_by_its_name_and_by_its_module(fake_dist) -> None:
    assert not told("another project")
    fake_dist(
        "Hyperion", {}, {"hyperion/__init__.py": "raise SystemExit('never imported')"}, version="0.9", requires=[]
    )
    (named,) = told("the distribution hyperion 0.9 is installed, which is another project")
    assert "pip uninstall hyperion" in named.fix
    (shadowed,) = [each for each in environment_findings() if "hyperion/__init__.py" in each.what]
    assert "is not ours" in shadowed.what or "is not of hyperion-ft" in shadowed.what
    assert fake_dist.imported() == []


@pytest.mark.parametrize("file", ["hyperion_core.py", "pydantic/__init__.py"])
def test_a_file_of_the_working_directory_that_hides_a_library_is_named(file: str, tmp_path: Path) -> None:
    assert not told("the working directory")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    (shadow,) = told("the working directory")
    assert str(tmp_path / file) in shadow.what
    assert shadow.level == "warning", "the command itself does not look there"


def test_a_folder_without_code_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "hyperion").mkdir()
    assert not told("hyperion of its own")


def test_two_copies_and_a_core_that_is_not_the_one_recorded(fake_dist) -> None:
    fake_dist("hyperion-core", {}, {}, version="0.7", requires=[])
    (copies,) = told("hyperion-core is installed 2 times")
    assert copies.level == "problem" and "0.7 in " in copies.what
    assert told("hyperion-core says that it is 0.7, and the module that is imported is")


def test_an_overwritten_file_is_not_taken_for_ours(fake_dist) -> None:
    folder = fake_dist("hyperion-ft", {}, {"hyperion/__init__.py": "__version__ = '1'"})
    assert not told("is not")
    (folder / "hyperion/__init__.py").write_text("from another import project")
    (overwritten,) = told("is not the file that hyperion-ft 1.0 installed")
    assert "overwritten" in overwritten.why
    (folder / "hyperion/__init__.py").unlink()
    assert told("hyperion of hyperion-ft 1.0 is missing") or told("a file that is not of hyperion-ft 1.0")


def test_what_distributions_without_plugins_ask_for(fake_dist) -> None:
    fake_dist("acme-shared", {}, {}, requires=["hyperion-core>=1", "no-such-library>=2", "pluggy<0.1"])
    found = {each.what: each for each in told("acme-shared 1.0 asks for")}
    assert found["acme-shared 1.0 asks for no-such-library>=2"].why == "it is not installed"
    assert "is installed" in found["acme-shared 1.0 asks for pluggy<0.1"].why


def test_a_python_that_does_not_fit_is_named(fake_dist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.9.18")
    fake_dist("acme-new", {}, {}, files={"METADATA": "Name: acme-new\nVersion: 1\nRequires-Python: >=3.10\n"
                                                     "Requires-Dist: hyperion-core"})  # fmt: skip
    (finding,) = told("acme-new 1 does not run on this Python")
    assert ">=3.10" in finding.why and "3.9.18" in finding.why


@pytest.mark.parametrize(
    "files", [{"entry_points.txt": "[hyperion.schedulers]\ngarbage"}, {"METADATA": "Name: acme\nVersion: \udcff"}]
)
def test_unreadable_metadata_is_told_and_hides_no_other_plugin(fake_dist, files: dict[str, str]) -> None:
    folder = fake_dist("acme", {"hyperion.schedulers": {"x": "acme:X"}}, {})
    fake_dist("sound", {"hyperion.schedulers": {"y": "sound:Y"}}, {})
    for name, text in files.items():
        (folder / "acme-1.0.dist-info" / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [entry.name for entry in fake_dist.registry().entries()] == ["y"]
    ((where, _),) = unreadable_distributions([str(each) for each in fake_dist.folders])
    assert where == str(folder / "acme-1.0.dist-info")


def test_one_check_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> None:
        raise KeyError("Name")

    monkeypatch.setattr(environment, "_unreadable", broken)
    (tmp_path / "pydantic.py").write_text("")
    assert told("the check of the environment's metadata failed")
    assert told("the working directory")
