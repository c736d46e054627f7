"""What the engine counts while it trains: tokens, seconds, the objective's metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..acceleration.documents import DOCUMENTS


class Figures:
    """Counts since the run began, and since the last line of the log. Tensors stay on their device until a line."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._supervised = torch.zeros((), dtype=torch.int64, device=device)
        self._metrics: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._waited = 0.0
        self._running_since: float | None = None
        self._last = (0, 0.0)

    def start(self) -> None:
        self._running_since = time.perf_counter()
        self._last = (int(self._tokens), self._seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training: evaluation, writing checkpoints."""
        running = self._running_since is not None
        self._seconds, self._running_since = self._elapsed(), None
        try:
            yield
        finally:
            if running:
                self._running_since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which training waits for its data; part of the seconds that it takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def count(self, inputs: Mapping[str, Any], supervised: Tensor) -> None:
        """One micro-batch: the tokens of its rows, padding not counted, and those that are learnt."""
        documents = inputs.get(DOCUMENTS)
        tokens = inputs["attention_mask"].ne(0).sum() if documents is None else documents.tokens
        self._tokens += tokens
        self._supervised += supervised

    def add_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """The objective's metrics of one micro-batch; like losses, those of a step's micro-batches add up."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._metrics[name] = self._metrics[name] + value if name in self._metrics else value

    def line(self, steps: int) -> dict[str, float]:
        """Figures for a line of the log that covers `steps` optimizer steps; counts from here anew."""
        tokens, seconds = int(self._tokens), self._elapsed()
        tokens_before, seconds_before = self._last
        self._last = (tokens, seconds)
        figures: dict[str, float] = {name: float(value) / steps for name, value in self._metrics.items()}
        self._metrics = {}
        figures["tokens"] = tokens
        figures["supervised_tokens"] = int(self._supervised)
        figures["tokens_per_second"] = round((tokens - tokens_before) / max(seconds - seconds_before, 1e-9), 1)
        figures["seconds"] = round(seconds, 3)
        figures["data_seconds"] = round(self._waited, 3)
        return figures

    def state(self) -> dict[str, Any]:
        return {
            "tokens": int(self._tokens),
            "supervised_tokens": int(self._supervised),
            "seconds": self._elapsed(),
            "data_seconds": self._waited,
            "metrics": {name: float(value) for name, value in self._metrics.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._tokens = torch.tensor(state["tokens"], dtype=torch.int64, device=self._device)
        self._supervised = torch.tensor(state["supervised_tokens"], dtype=torch.int64, device=self._device)
        self._seconds, self._waited = state["seconds"], state["data_seconds"]
        self._metrics = {name: torch.tensor(value, device=self._device) for name, value in state["metrics"].items()}

    def _elapsed(self) -> float:
        running = time.perf_counter() - self._running_since if self._running_since is not None else 0.0
        return self._seconds + running
