"""Where Hyperion keeps what it can make again: converted models, tokenized data."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from hyperion_core.errors import TrainingError


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


def check_caches() -> None:
    """Makes the folders that a run keeps prepared data and converted models in, and writes a file into each.

    Raises:
        TrainingError: one of them cannot be written; names the variable that moves it.
    """
    places = [("HYPERION_CACHE", cache_dir, "converted models and tokens"),
              ("HF_DATASETS_CACHE", _datasets_cache, "prepared rows")]  # fmt: skip
    for variable, folder, what in places:
        try:
            path = folder()
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"x")
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            where = getattr(error, "filename", None)
            raise TrainingError(
                f"the cache for {what} cannot be written" + (f": {where}" if where else ""),
                why=getattr(error, "strerror", None) or str(error),
                fix=f"set {variable} to a folder that you may write to, on a disk with room",
            ) from error


def _datasets_cache() -> Path:
    """Where the datasets library keeps its own: read from the environment as it does, without importing it."""
    if chosen := os.environ.get("HF_DATASETS_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "datasets"
