"""What a run will cost before it starts, and which settings fit. Imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_optimizer import AdapterOptimizer as AdapterOptimizer

__all__ = ["AdapterOptimizer"]


def __getattr__(name: str) -> Any:
    if name == "AdapterOptimizer":
        return importlib.import_module(".adapter_optimizer", __name__).AdapterOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
