"""Commands of the tests that are forked end as those that are not."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from forking import forking_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")


@pytest.mark.parametrize(
    "code, ended, said",
    [
        ("import sys; print(sys.stdin.read(), *sys.argv)", 0, "given -c more\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("import os; print(os.getcwd(), os.environ['SAID'])", 0, "{folder} so\n"),
    ],
)
def test_streams_codes_and_signals_are_those_of_the_child(code: str, ended: int, said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [forking_python(tmp_path), "-c", code, "more"], cwd=tmp_path, env={**os.environ, "SAID": "so"}, input="given",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (ended, said.format(folder=tmp_path))


def test_modules_are_found_beside_a_script_and_where_code_is_run(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("SAID = 'so'\n", encoding="utf-8")
    (tmp_path / "script.py").write_text("import beside\nprint(beside.SAID)\n", encoding="utf-8")
    python = forking_python(tmp_path)
    for given, folder in (([tmp_path / "script.py"], "/"), (["-c", "import beside; print(beside.SAID)"], tmp_path)):
        done = subprocess.run([python, *given], cwd=folder, capture_output=True, text=True)
        assert done.stdout == "so\n", done.stderr
