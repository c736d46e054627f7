"""Data: from a hub id, files or rows to a `datasets.Dataset` of segments or messages, and from there to tokens.

`DatasetProcessor` imports neither torch nor datasets until `prepare()` is called.
"""

from __future__ import annotations

from .processor import DatasetProcessor

__all__ = ["DatasetProcessor"]
