"""Which commit of a hub model a name and revision mean now."""

from __future__ import annotations

import re
from pathlib import Path

from hyperion_core.errors import ModelError

from .source import BaseModelSource

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 10.0  # seconds


def commit_of_snapshot(folder: Path | None) -> str | None:
    """The commit that a snapshot folder of the hub's cache is named after; None of any other folder."""
    return folder.name if folder is not None and _COMMIT.fullmatch(folder.name) else None


def hub_commit(source: BaseModelSource) -> str:
    """Asks the hub; without an answer, the snapshot in the local cache tells, which is then what a run loads.

    Raises:
        ModelError: neither knows.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    try:
        commit = HfApi().model_info(source.name, revision=source.revision, timeout=_TIMEOUT).sha
    except (OSError, HFValidationError) as error:  # OSError: the base of all of the hub's errors and the network's
        if cached := commit_of_snapshot(source.path):
            return cached
        raise ModelError(
            f"which commit of {source.name} is meant cannot be found out",
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="connect to the hub, or name the commit in the config: revision: …",
        ) from error
    if commit is None:
        raise ModelError(
            f"which commit of {source.name} is meant cannot be found out", why="the hub did not say",
            fix="name the commit in the config: revision: …",
        )  # fmt: skip
    return commit
