"""What a hook is told about the run that it is part of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .plan import Plan


class Progress(Protocol):
    """Shows how far a long operation is. The framework draws a bar; a test stays silent."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Inside, calling the given function with n says that n more units of `total` are done."""


class NoProgress:
    """Shows nothing."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda done: None)


@dataclass(frozen=True)
class RunContext:
    """One run, as its plugins see it.

    `device` is "cuda", "mps" or "cpu"; `output` is the run's folder and `cache` one that outlives it.
    `new_token_ids` are the rows of the embedding that the run added and an adapter is to train.
    """

    plan: Plan
    seed: int
    device: str
    output: Path
    cache: Path
    new_token_ids: tuple[int, ...] = ()
    progress: Progress = field(default_factory=NoProgress)
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("hyperion"))
