"""Bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hyperion.monitoring import progress as module
from hyperion.monitoring.progress import RichProgress


def shown(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return RichProgress(console), console.file


def test_a_quick_task_off_terminal_says_nothing():
    progress, text = shown(False)
    with progress.task("reading", 10) as advance:
        advance(10)
    assert text.getvalue() == ""


def test_a_slow_task_off_terminal_says_where_it_is(monkeypatch):
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    progress, text = shown(False)
    with progress.task("tokenizing", 40) as advance:
        for _ in range(4):
            advance(10)
    lines = text.getvalue().splitlines()
    assert lines == ["tokenizing: 20/40", "tokenizing: 40/40", "tokenizing: done, 40 in 30 s"]
    with progress.task("training", 40) as advance:
        advance(10)
        advance(10)
    assert text.getvalue().splitlines()[-1] == "training: ended at 20/40, in 18 s"


def nested_failure(progress):
    with progress.task("training", 4) as outer:
        outer(2)
        with progress.task("evaluating", 8) as inner:
            inner(8)
            progress.say("[bold] stays as it is")
            raise ValueError("inner")


def test_a_task_may_run_inside_another_and_an_exception_closes_both():
    progress, text = shown(True)
    with pytest.raises(ValueError, match="inner"):
        nested_failure(progress)
    assert "training" in text.getvalue()
    assert "evaluating" in text.getvalue()
    assert "[bold] stays as it is" in text.getvalue()
    assert not progress._bars.live.is_started
    with progress.task("again", 1) as advance:
        advance(1)
    assert "again" in text.getvalue()
