"""The order of the rows: a pure function of seed and epoch, so that a resumed run goes on with the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Row indices of one epoch; `set_epoch` before each.

    Args:
        rows: how many there are.
        strategy: "random", "sequential", or "group_by_length": random, with rows of like length in one optimizer step.
        lengths: tokens of each row, (rows,), for "group_by_length".
        group: rows of an optimizer step, for "group_by_length".
    """

    def __init__(self, rows: int, *, seed: int, strategy: str, lengths: Sequence[int] = (), group: int = 1) -> None:
        self.rows = rows
        self.seed = seed
        self.strategy = strategy
        self.lengths = lengths
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        if self.strategy == "sequential":
            yield from range(self.rows)
            return
        mixed = numpy.random.SeedSequence([self.seed, self.epoch])
        if self.strategy == "group_by_length":
            generator = torch.Generator().manual_seed(int(mixed.generate_state(1, numpy.uint64)[0] >> 1))
            yield from get_length_grouped_indices(list(self.lengths), self.group, generator=generator)
            return
        yield from numpy.random.default_rng(mixed).permutation(self.rows).tolist()
