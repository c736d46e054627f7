"""How long the rows of a run really are: what its largest pass comes to, once the data is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..acceleration.documents import common_beginning
from ..memory import pads
from ..training_config import TrainingConfig
from .memory_model import Step

if TYPE_CHECKING:
    from datasets import Dataset

_COMPARED = 64  # rows, of which the common beginning is taken for that of all


@dataclass(frozen=True, slots=True)
class RowLengths:
    """In tokens: `longest`, of one row; `together`, of the rows of one optimizer step, what they share counted once."""

    longest: int
    together: int

    def within(self, step: Step, training: TrainingConfig) -> Step:
        """The step, whose pack is no larger than the rows are together."""
        return step if pads(training) else replace(step, tokens=min(step.tokens, self.together))


def row_lengths(train: Dataset, training: TrainingConfig) -> RowLengths:
    """Of tokenized rows, with `input_ids`, `labels` and `length`, in some order that a shuffle might give them."""
    import numpy

    lengths = numpy.random.default_rng(0).permutation(numpy.asarray(train["length"][:]))
    count = min(len(lengths), training.per_device_train_batch_size * training.gradient_accumulation_steps)
    steps = numpy.add.reduceat(lengths, range(0, len(lengths), count))
    shared = common_beginning(list(train.select(range(min(_COMPARED, len(train))))))
    longest = int(lengths.max())
    return RowLengths(longest, max(longest, int(steps.max()) - shared * (count - 1)))
