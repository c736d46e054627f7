"""What stops a base model from being loaded, found while planning. Reads headers and names; needs no torch."""

from __future__ import annotations

from hyperion_core.facts import ModelFacts

from .folder import check_folder
from .gguf import check_convertible
from .gguf_header import read_header
from .source import BaseModelSource


def check_base(source: BaseModelSource, facts: ModelFacts, *, trust_remote_code: bool) -> None:
    """Refuses a base that is here, and that a run could not load.

    Args:
        source, facts: the model, and what `model_facts` says of it.

    Raises:
        ModelError: a file is missing or damaged, files contradict each other, or no library here knows the model.
    """
    if source.path is None:
        return
    if source.kind == "gguf":
        check_convertible(source.path, read_header(source.path))
    else:
        check_folder(source, facts, trust_remote_code=trust_remote_code)
