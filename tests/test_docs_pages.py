"""Every page of the docs with commands on it is followed, step by step, and prints what it says that it prints.

What is run of a page, and how: `docs/_ext/hyperion_docs/blocks.py`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from forking import fork_in
from hyperion_docs.blocks import blocks, environment, matches, patched, run_page

DOCS = Path(__file__).parents[1] / "docs"
# It trains the real model on real instructions, as tests/test_specification_workflow.py does.
ELSEWHERE = {"workflow.md"}
FENCED = re.compile(r"^```(\w+|\{code-block\} \w+)\n(?::caption: [^\n]*\n\n?)?(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [
    path.relative_to(DOCS).as_posix()
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts and any(block.kind == "console" for block in blocks(path.read_text("utf-8")))
]


def test_the_tutorial_and_the_first_run_are_among_them() -> None:
    assert {"tutorial/write-an-adapter.md", "getting-started.md", "troubleshooting.md"} <= set(PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_a_page_prints_what_it_says(page: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for folder in ("work", "reader"):
        (tmp_path / folder).mkdir()
    reader = environment(tmp_path / "reader")
    fork_in(Path(reader["PATH"].partition(os.pathsep)[0]))
    outcomes, _ = run_page((DOCS / page).read_text(encoding="utf-8"), tmp_path / "work", reader)
    other = [f"$ {each.command}\n{each.printed}" for each in outcomes if not each.as_expected]
    assert not other, f"{page} says something else than is printed:\n" + "\n".join(other)


def test_what_is_not_run_can_be_read_at_least() -> None:
    """Python compiles; YAML and JSON parse."""
    for page in sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts):
        for fence, code in FENCED.findall(page.read_text(encoding="utf-8")):
            language = fence.strip("{}").rpartition(" ")[2]
            if language == "python":
                compile(code, page.name, "exec")
            elif language == "yaml":
                assert isinstance(yaml.safe_load(code), dict), code
            elif language == "json":
                assert [json.loads(line) for line in code.splitlines() if line], code


@pytest.mark.parametrize(
    "expected, printed, wanted",
    [
        ("loss 5.4…\n", "loss 5.4321\n", True),
        ("loss 5.4…\n", "loss 5.5321\n", False),
        ("a\n…\nz\n", "a\nb\nc\nz\n", True),
        ("a\n…\nz\n", "a\nz\n", True),
        ("…\nz\n", "a\nb\n", False),
        ("a.b\n", "axb\n", False),
        ("", "an error\n", False),
    ],
)
def test_only_an_ellipsis_stands_for_anything(expected: str, printed: str, wanted: bool) -> None:
    assert matches(expected, printed) is wanted


def test_a_diff_that_does_not_fit_is_no_change() -> None:
    assert patched("a\nb\nc\n", " a\n-b\n+x\n") == "a\nx\nc\n"
    with pytest.raises(ValueError, match="stand 0 times"):
        patched("a\nb\n", "-c\n+d\n")
