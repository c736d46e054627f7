"""The audit of a run's data: in every run before the weights are loaded, and alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperion_core.context import NoProgress, Progress
from hyperion_core.errors import DataError

from .data.row_hook import RowHook
from .planning import Planned, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .config import FinetuneConfig
    from .data.audit.findings import AuditReport
    from .pipeline import Encoded


@dataclass(frozen=True)
class Audited:
    """A config's data as a run would read it, and what the audit says of it."""

    tokenizer: PreTrainedTokenizerBase
    encoded: Encoded
    report: AuditReport


def audit_encoded(
    encoded: Encoded,
    base: Path,
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> AuditReport:
    """All checks; raises nothing: `report.refuse()` does."""
    from .data.audit.audit import AuditedData, audit
    from .models.load import load_tokenizer

    own = None
    if config.dataset is not None and config.dataset.chat_template is not None:
        own = load_tokenizer(base, trust_remote_code=config.trust_remote_code).chat_template
    # Rows that were given in Python went through templates of their own.
    of_config = encoded.provenance.get("kind") != "given in Python" and planned.processor is not None
    return audit(
        AuditedData(*encoded.train),
        AuditedData(*encoded.evaluation) if encoded.evaluation else None,
        tokenizer,
        RowHook(planned.hooks.plugin("objective", config.objective.type), config.objective),
        max_length=encoded.max_length,
        config=config.audit,
        own_chat_template=own,
        literals=planned.processor.literals() if of_config and planned.processor else (),
        progress=progress,
    )


def audit_config(config: FinetuneConfig, progress: Progress | None = None) -> Audited:
    """Read and audit what a training of `config` would learn from. No weights are loaded, nothing is written but the
    caches.

    Raises:
        HyperionError: the config is refused, has no dataset, or its model or data cannot be had.
    """
    from .models.cache import check_caches
    from .pipeline import encode_data, load_tokenizer, obtain_base, start_context

    if config.dataset is None:
        raise DataError("there is no data", why="the config gives none", fix="set dataset: in the config")
    check_caches()
    planned = make_plan(config)
    ctx = start_context(planned, Path(), progress or NoProgress())
    base = obtain_base(planned, config, ctx)
    tokenizer, _ = load_tokenizer(base, config)
    encoded = encode_data(base, planned, config, tokenizer, ctx, None, None)
    return Audited(tokenizer, encoded, audit_encoded(encoded, base, planned, config, tokenizer, ctx.progress))
