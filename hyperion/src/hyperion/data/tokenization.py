"""Prepared rows to token ids and labels, on all cores, cached by the content of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import DataError
from hyperion_core.facts import Sequence

from .cached import drop_damaged_tokens
from .encoding import IGNORED, Encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from hyperion_core.context import Progress
    from transformers import PreTrainedTokenizerBase

# Part of the cache key: raise it when the tokens or labels of the same rows change.
_TOKENS_VERSION = 1
# Fewer rows than this for each process are tokenized sooner than another process starts.
_ROWS_A_PROCESS = 10_000
_BATCH = 500


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What tokenizing did.

    `rows`, `tokens` and `supervised` count what is left to train on; `truncated` rows were cut at the maximum
    length; `dropped` rows had nothing left to learn after that, and are gone; `longest` is the longest row in
    tokens before any cut. `warnings` are sentences for the user.
    """

    rows: int
    tokens: int
    supervised: int
    truncated: int
    dropped: int
    longest: int
    warnings: tuple[str, ...] = ()


def tokenize_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Callable[[Mapping[str, Any]], list[Sequence]],
    *,
    max_length: int,
    fingerprint_of: str,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Tokenizes prepared rows.

    Args:
        dataset: rows of `DatasetProcessor.prepare`.
        sequences: row to what the model reads of it, picklable; exactly one sequence a row.
        max_length: tokens a row; what is longer is cut on the right.
        fingerprint_of: identity of `sequences` (plugin, version and configuration), part of the cache key.
        num_proc: processes; by default one for every 10,000 rows, at most one a core.
        cache_dir: where the tokens are kept; datasets' own cache unless given.
        progress: draws the progress of a single process; otherwise, and with several, datasets draws its own bar.

    Returns:
        A row of tokens for every row. Columns: `input_ids` and `labels`, lists of int32 of equal length; `length`, and
        `uncut`, the length before max_length; `supervised`, how many tokens are learnt. A label is its position's
        token id, or -100 where nothing is learnt; labels are not shifted. The first label is always -100, because
        nothing predicts the first token.

    Raises:
        DataError: a row cannot be tokenized.
    """
    import datasets

    if not len(dataset):
        raise DataError("there are no rows to tokenize", why="the dataset is empty", fix="give one that holds rows")
    encoder = Encoder(tokenizer)
    key = _cache_key(dataset, encoder, max_length, fingerprint_of)
    cache_file = None
    if cache_dir is not None:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        cache_file = str(Path(cache_dir, f"tokens-{key}.arrow"))
        drop_damaged_tokens(Path(cache_file), len(dataset))
    processes = num_proc or max(1, min(available_cores(), len(dataset) // _ROWS_A_PROCESS))
    ids = datasets.Sequence(datasets.Value("int32"))
    count = datasets.Value("int32")
    with _shown(progress if processes == 1 else None, len(dataset)) as advance, _written(cache_file):
        tokens = dataset.map(
            _TokenizeBatch(encoder, sequences, max_length, advance),
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=datasets.Features(
                {"input_ids": ids, "labels": ids, "length": count, "supervised": count, "uncut": count}
            ),
            num_proc=processes if processes > 1 else None,
            cache_file_name=cache_file,
            load_from_cache_file=True,
            new_fingerprint=key,
            desc="tokenizing",
        )
    return tokens


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _TokenizeBatch:
    """What `Dataset.map` calls; picklable when `sequences` is."""

    def __init__(
        self,
        encoder: Encoder,
        sequences: Callable[[Mapping[str, Any]], list[Sequence]],
        max_length: int,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._encoder = encoder
        self._sequences = sequences
        self._max_length = max_length
        self._advance = advance

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found = []
        for position, index in enumerate(indices):
            made = self._sequences({column: values[position] for column, values in batch.items()})
            if len(made) != 1:
                raise DataError(
                    f"the objective makes {len(made)} sequences of row {index}",
                    why="training reads exactly one sequence of a row",
                    fix="choose another objective",
                )
            found.append(made[0])
        columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "length", "supervised", "uncut")}
        for ids, supervised in self._encoder.encode(found, indices):
            cut = ids[: self._max_length]
            labels = [token if learnt else IGNORED for token, learnt in zip(cut, supervised, strict=False)]
            labels[:1] = [IGNORED] * len(labels[:1])
            columns["input_ids"].append(cut)
            columns["labels"].append(labels)
            columns["length"].append(len(cut))
            columns["supervised"].append(len(labels) - labels.count(IGNORED))
            columns["uncut"].append(len(ids))
        if self._advance is not None:
            self._advance(len(indices))
        return columns


def trainable(tokens: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, TokenReport]:
    """Of the rows of `tokenize_rows` those that have something to learn, with a report.

    Columns: `input_ids`, `labels` and `length`.

    Raises:
        DataError: no row has anything to learn.
    """
    import numpy as np

    lengths, supervised, uncut = (
        np.asarray(tokens.data.column(name), dtype=np.int64) for name in ("length", "supervised", "uncut")
    )
    kept = np.flatnonzero(supervised)
    truncated, longest = int((uncut > max_length).sum()), int(uncut.max())
    if not len(kept):
        raise DataError(
            "no row has anything to learn",
            why=f"{truncated} of {len(tokens)} rows were cut at max_length {max_length}, and no supervised token is "
            "left in any"
            if truncated
            else "no token of any row is supervised",
            fix=f"raise max_length (the longest row has {longest} tokens)"
            if truncated
            else "check that the rows have answers, or assistant turns",
        )
    dropped = len(tokens) - len(kept)
    warnings = []
    if dropped:
        warnings.append(
            f"{dropped} of {len(tokens)} rows are left out: nothing to learn is left of them"
            + (f" within max_length {max_length} (the longest row has {longest} tokens)" if truncated else "")
        )
    if tokenizer.eos_token_id is None:
        warnings.append("the tokenizer has no end-of-sequence token, so the model does not learn where to stop")
    result = tokens.select(kept) if dropped else tokens
    return result.remove_columns(["supervised", "uncut"]), TokenReport(
        rows=len(kept),
        tokens=int(lengths[kept].sum()),
        supervised=int(supervised.sum()),
        truncated=truncated,
        dropped=dropped,
        longest=longest,
        warnings=tuple(warnings),
    )


def _cache_key(dataset: Dataset, encoder: Encoder, max_length: int, fingerprint_of: str) -> str:
    parts = [_TOKENS_VERSION, dataset._fingerprint, encoder.identity(), max_length, fingerprint_of]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _written(cache_file: str | None) -> Iterator[None]:
    """Inside, a disk that refuses the tokens is named."""
    try:
        yield
    except OSError as error:
        where = Path(cache_file).parent if cache_file else "datasets' cache"
        raise DataError(
            f"the tokens cannot be written to {where}",
            why=error.strerror or str(error),
            fix="free some space, or set HYPERION_CACHE to a folder on another disk",
        ) from error


@contextmanager
def _shown(progress: Progress | None, total: int) -> Iterator[Callable[[int], None] | None]:
    """The caller's display, datasets' own bar silent; or datasets' bar alone."""
    if progress is None:
        yield None
        return
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with progress.task("tokenizing", total) as advance:
            yield advance
    finally:
        if not were_off:
            datasets.enable_progress_bars()
