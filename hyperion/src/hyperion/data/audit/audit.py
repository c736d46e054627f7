"""The audit: every check on the data of one run, all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hyperion_core.context import NoProgress, Progress
from hyperion_core.facts import Sequence

from . import counted
from .config import AuditConfig
from .findings import AuditReport, Finding, excerpt
from .measures import Measures, measure
from .rendering import Template
from .rows import Turn, keys, turns_of
from .sampled import Reader

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CONVERSATIONS = 20  # enough to see with which tokens a template ends turns


@dataclass(frozen=True, slots=True)
class AuditedData:
    """Prepared rows and the tokens made of them, row by row the same.

    `tokens` has input_ids and labels, and `uncut` (tokens before max_length) where that is known.
    """

    rows: Dataset
    tokens: Dataset


def audit(
    training: AuditedData,
    evaluation: AuditedData | None,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Callable[[Mapping[str, Any]], list[Sequence]],
    *,
    max_length: int,
    config: AuditConfig | None = None,
    own_chat_template: str | None = None,
    literals: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> AuditReport:
    """Looks at everything; raises nothing. `AuditReport.refuse()` raises.

    Of the evaluation data it only warns, but for rows that are trained on.

    Args:
        sequences: row to what the model is to read of it, as the objective says.
        max_length: tokens a row.
        own_chat_template: the tokenizer's own template, where the config has put another in its place.
        literals: texts of the config's templates that every row must hold.
    """
    config = config or AuditConfig()
    total = len(training.tokens) + (len(evaluation.tokens) if evaluation else 0)
    with (progress or NoProgress()).task("auditing", total) as advance:
        part = _Part(training, tokenizer, sequences, max_length, config, literals, advance)
        findings = part.findings()
        chat = _chat_template(part, tokenizer, own_chat_template)
        training_keys = list(keys(training.rows))
        findings += [chat, counted.duplicates(training_keys, config, part.example)]
        sampled = len(part.sample)
        if evaluation is not None:
            held_out = _Part(evaluation, tokenizer, sequences, max_length, config, literals, advance)
            overlap = counted.overlap(training_keys, list(keys(evaluation.rows)), config, held_out.example)
            findings.append(replace(overlap, data="evaluation"))
            findings += [
                replace(finding, data="evaluation", state="warned")
                for finding in held_out.findings()
                if finding.state != "ok"
            ]
            sampled += len(held_out.sample)
    return AuditReport(tuple(findings), total, sampled).allowing(config.allow)


class _Part:
    """The training or the evaluation data."""

    def __init__(
        self,
        data: AuditedData,
        tokenizer: PreTrainedTokenizerBase,
        sequences: Callable[[Mapping[str, Any]], list[Sequence]],
        max_length: int,
        config: AuditConfig,
        literals: tuple[str, ...],
        advance: Callable[[int], None],
    ) -> None:
        self._data, self._tokenizer, self._sequences = data, tokenizer, sequences
        self._max_length, self._config = max_length, config
        count = len(data.rows)
        self.sample = sorted(
            {number * count // min(count, config.sample) for number in range(min(count, config.sample))}
        )
        self.template = Template(tokenizer)
        first = [self.sequence(number) for number in self.sample[:_CONVERSATIONS]]
        self.chats = [sequence.messages for sequence in first if sequence.messages]
        self._plain_text = all(len(turns_of(each)) == 1 and not each.messages for each in first)
        eos = tokenizer.eos_token_id
        self.ends = counted.EndTokens(
            eos, str(tokenizer.eos_token), self.template.turn_ends(self.chats), tokenizer.pad_token_id == eos
        )
        self._reader = Reader(tokenizer, self.template, self.ends.turn_ends, literals)
        self._measures: Measures = measure(data.tokens, self.ends.ids(), max_length, advance)

    def sequence(self, number: int) -> Sequence:
        return self._sequences(self._data.rows[number])[0]

    def example(self, number: int) -> str:
        return f"row {number}: {excerpt(' … '.join(turn.text for turn in turns_of(self.sequence(number))))}"

    def findings(self) -> list[Finding]:
        measures, config = self._measures, self._config
        last_learnt = self._last_turns_learnt()
        cut = measures.uncut > measures.length
        shortened = cut & (last_learnt | (measures.supervised == 0))
        for number in self.sample:
            row = self._data.tokens[number]
            self._reader.look(number, self.sequence(number), row["input_ids"], row["labels"], bool(cut[number]))
        bos = self._tokenizer.bos_token_id
        wrong = int((measures.wrong > 0).sum())
        return [
            counted.supervised(measures, config, self.example),
            counted.truncation(measures, config, self._max_length, shortened, self._plain_text, self.example),
            counted.eos(measures, config, self.ends, last_learnt, self.example),
            counted.bos(measures, bos, str(self._tokenizer.bos_token), self.example),
            self._reader.masking(config, wrong, measures.rows),
            self._reader.template(config),
            self._reader.special_tokens(config, bool(self.chats)),
        ]

    def _last_turns_learnt(self) -> Any:
        """(N,) whether a row ends in what is to be learnt."""
        import numpy as np

        rows = self._data.rows
        column = next((name for name in ("messages", "segments") if name in rows.column_names), None)
        if column is None:  # an objective of its own reads other columns: ask it
            return np.array([_ends_learnt(turns_of(self.sequence(number))) for number in range(len(rows))], dtype=bool)
        found: list[bool] = []
        for batch in rows.select_columns([column]).iter(1_000):
            for parts in batch[column]:
                last = parts[-1] if parts else {}
                found.append(last.get("role") == "assistant" or bool(last.get("supervised")))
        return np.array(found, dtype=bool)


def _ends_learnt(turns: list[Turn]) -> bool:
    return bool(turns) and turns[-1].learnt


def _chat_template(part: _Part, tokenizer: PreTrainedTokenizerBase, own: str | None) -> Finding:
    """Whether the config's template is the one that the tokenizer came with."""
    if not part.chats:
        return Finding("chat_template", "ok", "no chat rows")
    if own is None:
        return Finding("chat_template", "ok", "the rows go through the chat template in force, the only one")
    chosen = tokenizer.chat_template
    if str(chosen).strip() == own.strip():
        return Finding("chat_template", "ok", "the config's chat template is the tokenizer's own")
    ours = [part.template.render(messages) for messages in part.chats]
    try:
        tokenizer.chat_template = own
        theirs = [part.template.render(messages) for messages in part.chats]
    finally:
        tokenizer.chat_template = chosen
    different = [number for number, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    if not different:
        return Finding(
            "chat_template", "ok", "the config's chat template writes these rows as the tokenizer's own does"
        )
    number = different[0]
    return Finding(
        "chat_template", "refused",
        "the config's chat template and the one that the tokenizer has write the rows differently",
        "the base was tuned on its own template, and whoever asks it without yours uses that one",
        "take dataset.chat_template out, or, if you mean it: audit: {allow: [chat_template]}",
        {"rows": len(part.chats), "different": len(different)}, None,
        (f"row {part.sample[number]}, config: {excerpt(str(ours[number]))}",
         f"row {part.sample[number]}, tokenizer: {excerpt(str(theirs[number]))}"),
    )  # fmt: skip
