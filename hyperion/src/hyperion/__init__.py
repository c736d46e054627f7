"""Hyperion: fine-tune large language models; everything a method can be is a plugin.

Names load when they are first used: `import hyperion` imports neither torch nor any plugin. A name that lives in a
plugin (`LoraConfig`) is found through the entry-point group `hyperion.exports`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from hyperion_core.secrets import hide_in_logs

__version__ = "0.1.0"
hide_in_logs(logging.getLogger("hyperion"))

if TYPE_CHECKING:
    from hyperion_core.artifact import Artifact as Artifact
    from hyperion_core.config import QuantizationConfig as QuantizationConfig
    from hyperion_core.errors import HyperionError as HyperionError

    from .config import FinetuneConfig as FinetuneConfig
    from .trainer import Trainer as Trainer

_PUBLIC = {
    "Artifact": "hyperion_core.artifact",
    "FinetuneConfig": "hyperion.config",
    "HyperionError": "hyperion_core.errors",
    "QuantizationConfig": "hyperion_core.config",
    "Trainer": "hyperion.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name.startswith("_"):  # Python asks for __path__ and the like; no plugin may answer
        raise AttributeError(f"module 'hyperion' has no attribute {name!r}")
    from hyperion_core.errors import PluginNotFoundError
    from hyperion_core.registry import registry

    try:
        return registry().exported(name)
    except PluginNotFoundError as error:
        raise AttributeError(f"module 'hyperion' has no attribute {name!r}, and no plugin exports it") from error


def __dir__() -> list[str]:
    from hyperion_core.registry import registry

    return sorted({*_PUBLIC, "__version__", *(entry.name for entry in registry().entries("export"))})
