"""Fixtures of the framework's own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forking import ForkingCommand


@pytest.fixture
def cli(tmp_path: Path, fake_dist: Any) -> ForkingCommand:
    """That of hyperion_core.testing, without the seconds that it takes to import."""
    return ForkingCommand(tmp_path, fake_dist)
