"""Every case of bad input, as a user meets it: told what, whose, why and how to mend it; code 2; nothing half-written.

The cases are in `bad_input/`, one module an area. They also make docs/reference/errors.md, which is compared here.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from bad_input.case import Case, Outcome, place_for, run_case
from bad_input.table import errors_page

pytestmark = pytest.mark.slow

AREAS = ("config", "data", "model", "quantization", "plugins", "disk", "command_line")
PAGE = Path(__file__).parent.parent / "docs/reference/errors.md"
HERE = Path(__file__).parent / "bad_input"
CASES: tuple[Case, ...] = tuple(
    case
    for area in AREAS
    if (HERE / f"{area}.py").exists()
    for case in importlib.import_module(f"bad_input.{area}").CASES
)
SECONDS = 60
Run = Callable[[Case], Outcome]


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Run]:
    """Gives a case's outcome. The cases of the tests that were chosen run two at a time, from the start."""
    root = tmp_path_factory.mktemp("bad-input")
    running: dict[Case, Future[Outcome]] = {}
    with ThreadPoolExecutor(2) as pool:

        def start(case: Case) -> Future[Outcome]:
            try:
                with place_for(case, root / str(len(running)), tiny_model) as (place, arguments):
                    return pool.submit(run_case, case, place, arguments, SECONDS)
            except Exception as error:  # the test of this case fails, not all
                failed: Future[Outcome] = Future()
                failed.set_exception(error)
                return failed

        def outcome(case: Case) -> Outcome:
            if case not in running:
                running[case] = start(case)
            return running[case].result()

        for item in request.session.items:
            case = getattr(item, "callspec", None) and item.callspec.params.get("case")
            if isinstance(case, Case) and item.path == request.path:
                running[case] = start(case)
        yield outcome


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_explained(case: Case, run: Run) -> None:
    outcome = run(case)
    printed = outcome.result.stderr
    assert outcome.result.code == 2, f"exit code {outcome.result.code}\n{outcome.result.stdout}\n{printed}"
    assert "Traceback" not in printed + outcome.result.stdout
    missing = [text for text in case.says if text not in outcome.error and text not in printed]
    assert not missing, f"{missing} not in:\n{outcome.error}"
    for problem in problems_in(printed):
        assert re.search(r"^\s+why: \S", problem, re.MULTILINE), f"no why in:\n{problem}"
        assert re.search(r"^\s+fix: \S", problem, re.MULTILINE), f"no fix in:\n{problem}"
    unprintable = [char for char in printed if char != "\n" and not char.isprintable()]
    assert not unprintable, f"{unprintable} reach the terminal"
    assert not outcome.left, f"half-written: {outcome.left}"


def problems_in(printed: str) -> list[str]:
    """Each thing that is wrong, with its why and fix: of a config they are listed, each indented by two."""
    start = printed.find("error: ")
    assert start >= 0, f"no error in:\n{printed}"
    head, _, rest = printed[start:].partition("\n")
    if not re.search(r"has \d+ problems?:$", head):
        return [printed[start:]]
    problems = re.split(r"^  (?=\S)", rest, flags=re.MULTILINE)[1:]
    assert len(problems) == int(re.search(r"has (\d+) problem", head)[1]), printed  # type: ignore[index]
    return problems


def test_there_are_enough_cases_of_each_area() -> None:
    assert len(CASES) >= 60
    assert {case.area for case in CASES} == {area.replace("_", " ") for area in AREAS}
    twice = [what for what, times in Counter(map(str, CASES)).items() if times > 1]
    assert not twice


def test_the_page_of_errors_shows_what_is_really_said(run: Run) -> None:
    """HYPERION_WRITE_DOCS=1 writes it anew."""
    page = errors_page((case, run(case).error) for case in CASES)
    if os.environ.get("HYPERION_WRITE_DOCS"):
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "run the tests with HYPERION_WRITE_DOCS=1 and look at the diff"
