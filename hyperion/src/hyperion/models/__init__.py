"""Base models: where one lies, what is known of it without its weights, and how it is loaded; and tuned ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .standalone import load_standalone as load_standalone
    from .tuned import load_tuned as load_tuned


def __getattr__(name: str) -> Any:
    if name == "load_tuned":
        from .tuned import load_tuned

        return load_tuned
    if name == "load_standalone":
        from .standalone import load_standalone

        return load_standalone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
