"""The hash of a plugin's source: what stands in lock files and cache keys changes when the code does, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hyperion.data.identity import cache_identity, source_hash


def test_every_file_of_the_package_counts_and_how_lines_end_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "locked_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_bytes(b"")
    (package / "inner" / "plugin.py").write_bytes(b"one = 1\ntwo = 2\n")
    (package / "beside.py").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    first = source_hash("locked_package")
    assert first and first == source_hash("locked_package.inner.plugin")
    (package / "inner" / "plugin.py").write_bytes(b"one = 1\r\ntwo = 2\r\n")
    assert source_hash("locked_package") == first
    (package / "beside.py").write_bytes(b"three = 3\n")
    changed = source_hash("locked_package.inner.plugin")
    assert changed != first
    (package / "beside.py").rename(package / "renamed.py")
    assert source_hash("locked_package") not in (first, changed)
    assert "locked_package" not in sys.modules, "it was imported to be hashed"


SCRIPT = """
from hyperion.data.identity import cache_identity, source_hash
class Plugin: ...
print(source_hash("__main__"), cache_identity(Plugin()), cache_identity(Plugin()))
"""


def test_a_plugin_of_a_script_has_the_scripts_hash_and_a_typed_one_is_never_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_script.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    run = [sys.executable, str(tmp_path / "own_script.py")]
    script = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert script == [source_hash("own_script")] * 3
    typed = subprocess.run([sys.executable], input=SCRIPT, capture_output=True, text=True, check=True).stdout.split()
    assert typed[0] == "None" and typed[1] != typed[2]
    assert source_hash("no_such_module") is None and cache_identity(self_made()) != cache_identity(self_made())


def self_made() -> object:
    return type("Plugin", (), {"__module__": "no_such_module"})()
