"""What benchmarks and guards ask of a model, whether it is live, packaged, or behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class LanguageModel(Protocol):
    """Two questions are enough for the field's benchmarks."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's summed log-probability in nats, and whether greedy
        decoding would have produced it."""

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy continuations, without the prompts."""
