"""What the core's tests share: sources of plugins, written from the specifications."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hyperion_core.kinds import KINDS, Plugin


@pytest.fixture(params=KINDS, ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> type[Plugin]:
    """Each kind in turn."""
    return request.param


@pytest.fixture
def plugin_source() -> Callable[..., str]:
    """`plugin_source(Adapter)`: a module with a class Fake that has the hooks that the kind asks for."""

    def write(kind: type[Plugin], body: str = "") -> str:
        hooks = "".join(f"    def {hook}(self): return '{hook}'\n" for hook in kind.required())
        return f"from hyperion_core.kinds import {kind.__name__}\nclass Fake({kind.__name__}):\n    pass\n{hooks}{body}"

    return write
