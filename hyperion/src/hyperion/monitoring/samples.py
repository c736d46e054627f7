"""What the model answers now: a few rows of the evaluation data, for people to read. Loaded for training only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .progress import RichProgress

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from hyperion_core.context import RunContext
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from .metrics import MetricsFile

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids before the first supervised token of a row, and the supervised ones that follow it at once."""

    ids: list[int]
    expected: list[int]


def prompts_of(rows: Dataset, count: int) -> list[Prompt]:
    """The first `count` rows that begin with something to answer to."""
    found: list[Prompt] = []
    for row in rows:
        if len(found) == count:
            break
        ids, labels = list(row["input_ids"]), list(row["labels"])
        learnt = [position for position, label in enumerate(labels) if label != IGNORED]
        if not learnt or learnt[0] == 0:
            continue
        start = learnt[0]
        end = next((p for p in range(start, len(labels)) if labels[p] == IGNORED), len(labels))
        found.append(Prompt(ids[:start], ids[start:end]))
    return found


class SampleWriter:
    """Greedy answers to the same rows at each evaluation, shown and appended to samples.jsonl.

    `before_each` is called before each answer, and may raise to leave the others out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset | None,
        file: MetricsFile,
        *,
        count: int,
        max_new_tokens: int,
        ctx: RunContext,
        before_each: Callable[[], None] = lambda: None,
    ) -> None:
        self.before_each = before_each
        self.tokenizer = tokenizer
        self.file = file
        self.max_new_tokens = max_new_tokens
        self.ctx = ctx
        self.prompts = prompts_of(rows, count) if rows is not None and count else []

    def write(self, model: Module, step: int) -> None:
        """Generate, show, append. The model's mode is as before; greedy decoding draws no random number."""
        if not self.prompts:
            return
        training = model.training
        model.eval()
        try:
            for prompt in self.prompts:
                self.before_each()
                line = {
                    "step": step,
                    "prompt": self._text(prompt.ids),
                    "expected": self._text(prompt.expected),
                    "generated": self._text(self._answer(model, prompt.ids)),
                }
                self.file.append(line)
                self._show(line)
        finally:
            model.train(training)

    @torch.no_grad()
    def _answer(self, model: Any, ids: list[int]) -> list[int]:
        from transformers import GenerationConfig

        device = next(model.parameters()).device
        given = torch.tensor([ids], device=device)
        # one row at a time: no padding, so nothing depends on how a model treats it
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self._end_tokens(model),
        )  # fmt: skip
        answer = model.generate(input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings)
        return answer[0, len(ids) :].tolist()

    def _end_tokens(self, model: Any) -> list[int]:
        """Where an answer ends: the tokenizer's token, and those of a chat model's own settings."""
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        known = own if isinstance(own, list) else [own]
        return sorted({token for token in (*known, self.tokenizer.eos_token_id) if token is not None})

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _show(self, line: dict[str, Any]) -> None:
        if isinstance(self.ctx.progress, RichProgress):
            self.ctx.progress.say(
                f"  prompt:    {_short(line['prompt'])}\n"
                f"  expected:  {_short(line['expected'])}\n"
                f"  generated: {_short(line['generated'])}"
            )


def _short(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else "…" + text[1 - width :]
