"""The rows that a quantizer measures on before it rounds: tokens of the run's own training data, or of named data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.config import CalibrationConfig, QuantizationConfig
from hyperion_core.context import Progress, RunContext
from hyperion_core.errors import DataError
from hyperion_core.facts import ModelFacts, Segment, Sequence
from hyperion_core.kinds import Plugin, Quantizer

from ..models.facts import model_facts
from ..models.source import resolve_source
from .existing import saved_quantization

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CalibrationRows = list[dict[str, "Tensor"]]
"""Each `input_ids` and `attention_mask`, int64 (1, T)."""

_LEAST_TOKENS = 128


def measured_rows(
    base: Path,
    config: QuantizationConfig,
    plugin: Plugin,
    tokens: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: Path | None,
    ctx: RunContext,
) -> CalibrationRows | None:
    """What is measured on before the model in `base` is quantized; None where that asks for nothing.

    Args:
        tokens: the run's training data; used where `config.calibration` names no other.
        base_dir: where relative paths of the config start.

    Raises:
        DataError: the data cannot be had, or is too short.
    """
    assert isinstance(plugin, Quantizer)
    allots = config.bits == "auto" and config.bit_plan is None
    if saved_quantization(base) is not None or not (plugin.provides.calibration or allots):
        return None
    chosen = config.calibration or CalibrationConfig()
    if chosen.dataset is None:
        rows = training_rows(tokens, chosen)
    else:
        rows = named_rows(chosen, tokenizer, base_dir, ctx.cache, ctx.progress)
    refuse_too_short(rows, model_facts(resolve_source(str(base))))
    ctx.log.info("calibration: %d rows, %d tokens", len(rows), sum(row["input_ids"].numel() for row in rows))
    return rows


def training_rows(tokens: Dataset, config: CalibrationConfig) -> CalibrationRows:
    """Some of the rows that a run trains on, drawn by `config.seed`, each cut at `config.max_length` tokens.

    Args:
        tokens: with a column `input_ids`, as `data.tokenization` makes it.
    """
    import numpy as np
    import torch

    chosen = np.random.default_rng(config.seed).permutation(len(tokens))[: config.rows]
    rows = []
    for ids in tokens.select(chosen)["input_ids"]:
        row = torch.tensor([ids[: config.max_length]], dtype=torch.int64)
        rows.append({"input_ids": row, "attention_mask": torch.ones_like(row)})
    return rows


def named_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: Path | None,
    cache: Path,
    progress: Progress,
) -> CalibrationRows:
    """Rows of `config.dataset`, which `DatasetProcessor` reads; messages go through the tokenizer's chat template.

    Raises:
        DataError: the dataset cannot be had or read.
    """
    from ..data.processor import DatasetProcessor
    from ..data.tokenization import tokenize_rows

    assert config.dataset is not None
    rows, _ = DatasetProcessor(config.dataset, base_dir=base_dir, seed=config.seed).prepare(progress=progress)
    tokens = tokenize_rows(
        rows,
        tokenizer,
        _as_read,
        max_length=config.max_length,
        fingerprint_of="calibration 1",
        cache_dir=cache / "tokens",
        progress=progress,
    )
    return training_rows(tokens, config)


def refuse_too_short(rows: CalibrationRows, facts: ModelFacts) -> None:
    """A layer of n inputs is rounded by what n or more tokens say of them: fewer leave directions unseen.

    Raises:
        DataError: there are fewer tokens than the widest linear module has inputs.
    """
    tokens = sum(int(row["attention_mask"].sum()) for row in rows)
    width = max((module.shape[1] for module in facts.linear()), default=_LEAST_TOKENS)
    if tokens < width:
        raise DataError(
            f"the calibration data is too short: {tokens} tokens in {len(rows)} rows",
            why=f"the widest layers have {width:,} inputs, and fewer tokens than that cannot tell how to round them",
            fix="name more data: quantization.calibration.dataset; or raise its rows or max_length",
        )


def rows_hash(rows: CalibrationRows) -> str:
    """SHA-256 of the tokens, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "attention_mask"):
            digest.update(str(tuple(row[name].shape)).encode() + row[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def _as_read(row: Mapping[str, Any]) -> list[Sequence]:
    """What the model reads of a prepared row, all of it."""
    if row.get("messages"):
        return [Sequence(messages=tuple(_given(message) for message in row["messages"]))]
    return [Sequence(segments=tuple(Segment(part["text"], True) for part in row.get("segments") or ()))]


def _given(message: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    # Arrow gives every message all the keys that any message has; a chat template would take None for a value.
    return {key: value for key, value in dict(message).items() if value is not None}
