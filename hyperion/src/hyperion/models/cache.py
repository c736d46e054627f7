"""Where Hyperion keeps what it can make again: converted models, tokenized data."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder, not created: `HYPERION_CACHE`, else the platform's own place for caches."""
    if chosen := os.environ.get("HYPERION_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hyperion"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "hyperion"
    # The XDG specification says to ignore a relative path.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "hyperion"
