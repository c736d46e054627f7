"""A library is quiet for a while; its errors are not."""

from __future__ import annotations

import contextlib
import logging

import pytest
from hyperion_core.quiet import errors_only


def test_errors_are_told_and_levels_come_back(caplog: pytest.LogCaptureFixture) -> None:
    library, below = logging.getLogger("chatty"), logging.getLogger("chatty.inner")
    library.setLevel(logging.INFO)
    with errors_only("chatty", "another"):
        below.warning("a library that does not load")
        below.error("a real fault")
    with contextlib.suppress(KeyError), errors_only("chatty"):
        raise KeyError
    below.warning("afterwards")
    assert [record.message for record in caplog.records] == ["a real fault", "afterwards"]
    assert library.level == logging.INFO and logging.getLogger("another").level == logging.NOTSET
