"""That something is refused, and refused as the contract has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ..errors import HyperionError


@contextmanager
def refused(what: str, kind: type[HyperionError] = HyperionError) -> Iterator[None]:
    """What runs inside must raise `kind`, not something else, and not go through."""
    try:
        yield
    except kind:
        return
    except Exception as error:
        pytest.fail(f"{what} ends in {type(error).__name__}, not in {kind.__name__}: {error}")
    pytest.fail(f"{what} is not refused: raise {kind.__name__}")
