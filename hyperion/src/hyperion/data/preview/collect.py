"""Tokenized data to what a preview shows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...acceleration.documents import pack_capacity
from .contents import AuditLine, Preview, Sample, SplitFigures
from .figures import histogram, packs, padding, percentile
from .spans import shortened, spans

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ...auditing import Audited
    from ...config import FinetuneConfig
    from ..audit.findings import AuditReport, Finding

_SHOWN_OF_A_TEXT = 600


def collect(config: FinetuneConfig, audited: Audited, *, rows: int) -> Preview:
    """Every figure, `rows` samples, and the audit. Rows with nothing to learn are counted apart."""
    from ...memory import why_padded
    from ...planning import Rows, optimizer_steps

    encoded, tokenizer = audited.encoded, audited.tokenizer
    max_length, train = encoded.max_length, encoded.train[1]
    training = config.training
    lengths = _trained(train)
    size, order = training.per_device_train_batch_size, list(_first_epoch(config, lengths))
    padded = padding(lengths, order, size, drop_last=bool(getattr(training, "dataloader_drop_last", None)))
    splits = [_figures("training", train, max_length)]
    longest = max(lengths, default=1)
    if encoded.evaluation is not None:
        splits.append(_figures("evaluation", encoded.evaluation[1], max_length))
        longest = max([longest, *_trained(encoded.evaluation[1])])
    capacity = pack_capacity(training.pack_length, longest, size, training.likely_device())
    read, rows_a_step = order[: padded.batches * size], size * training.gradient_accumulation_steps
    return Preview(
        config=config.file.name if config.file else "config",
        base_model=_last_part(config.base_model),
        dataset=_last_part(config.dataset.dataset) if config.dataset else "the given rows",
        max_length=max_length,
        samples=[_sample(train, row, tokenizer) for row in _chosen(_column(train, "uncut"), rows)],
        splits=splits,
        steps=(optimizer_steps(config, Rows(len(lengths), 0))[0] or 0) if lengths else 0,
        schedule=_schedule(config),
        batch_size=size,
        padded=padded,
        packs=packs(lengths, read, rows_a_step, capacity),
        capacity=capacity,
        why_padded=why_padded(training),
        audit_summary=_summary(audited.report),
        audit=[_audit_line(finding) for finding in audited.report.findings],
    )


def _summary(report: AuditReport) -> str:
    refused = len(report.of("refused"))
    if not refused:
        return report.summary()
    return f"The audit refuses {refused} thing{'' if refused == 1 else 's'}: a training on these data would not start."


def _audit_line(finding: Finding) -> AuditLine:
    told = (("why", finding.why), ("fix", finding.fix)) if finding.state != "ok" else ()
    details = [f"{label}: {text}" for label, text in told if text]
    if finding.state != "ok":
        details += finding.examples
    where = "" if finding.data == "training" else f"{finding.data} data: "
    return AuditLine(finding.name, finding.state, where + finding.what, details)


def _figures(name: str, tokens: Dataset, max_length: int) -> SplitFigures:
    uncut, trained = _column(tokens, "uncut"), _trained(tokens)
    ordered = sorted(uncut)
    return SplitFigures(
        name=name,
        rows=len(trained),
        tokens=sum(trained),
        learnt=sum(_column(tokens, "supervised")),
        shortest=ordered[0],
        median=percentile(ordered, 50),
        p95=percentile(ordered, 95),
        longest=ordered[-1],
        cut=[row for row, length in enumerate(uncut) if length > max_length],
        dropped=len(tokens) - len(trained),
        bars=histogram(uncut, max_length),
    )


def _trained(tokens: Dataset) -> list[int]:
    """Lengths of the rows that are trained on."""
    both = zip(_column(tokens, "length"), _column(tokens, "supervised"), strict=True)
    return [length for length, learnt in both if learnt]


def _column(tokens: Dataset, name: str) -> list[int]:
    return [int(value) for value in tokens[name]]


def _first_epoch(config: FinetuneConfig, lengths: list[int]) -> Iterable[int]:
    """The rows in the order in which a run reads them in its first epoch."""
    from ...engine.sampler import EpochSampler

    training = config.training
    data_seed = getattr(training, "data_seed", None)
    return EpochSampler(
        len(lengths),
        seed=training.seed if data_seed is None else data_seed,
        strategy=training.train_sampling_strategy,
        lengths=lengths,
        group=training.per_device_train_batch_size * training.gradient_accumulation_steps,
    )


def _chosen(lengths: list[int], wanted: int) -> list[int]:
    """Rows to show: spread evenly, and, of several, the longest among them."""
    wanted = min(wanted, len(lengths))
    spread = [number * len(lengths) // wanted for number in range(wanted)]
    longest = lengths.index(max(lengths))
    if wanted > 1 and longest not in spread:
        spread[-1] = longest
    return sorted(spread)


def _sample(tokens: Dataset, number: int, tokenizer: PreTrainedTokenizerBase) -> Sample:
    row = tokens[number]
    return Sample(
        number=number,
        tokens=row["length"],
        learnt=row["supervised"],
        uncut=row["uncut"],
        spans=shortened(spans(row["input_ids"], row["labels"], tokenizer), _SHOWN_OF_A_TEXT),
    )


def _schedule(config: FinetuneConfig) -> str:
    training = config.training
    each = training.per_device_train_batch_size * training.gradient_accumulation_steps
    epochs = training.num_train_epochs
    length = f"{epochs:g} epoch{'' if epochs == 1 else 's'}" if training.max_steps <= 0 else "max_steps"
    return f"{length}, {each} rows a step."


def _last_part(name: str) -> str:
    """A hub id as it is; of a path only the end, which is not the machine's business."""
    if "://" in name or not (name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") > 1):
        return name
    return Path(name.replace("\\", "/")).name
