"""The live line of a training run. Imports transformers: loaded for training only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Self

from .progress import RichProgress

if TYPE_CHECKING:
    from hyperion_core.context import Progress
    from rich.progress import TaskID

MiB = 2**20


class TrainingLine(TrainerCallback):
    """Step, loss, learning rate, tokens a second, time left and memory: one live line on a terminal, a line a
    logged step elsewhere, nothing under a silent progress. A context manager, so that an exception closes the bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress if isinstance(progress, RichProgress) else None
        self._bar: TaskID | None = None
        self._note = ""
        self._started = (0, 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None and self._bar is not None:
            self.progress.close(self._bar)
            self._bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = (state.global_step, time.monotonic())
        if self.progress is not None and self.progress.live:
            self._bar = self.progress.open("training", state.max_steps)
            self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if self.progress is None or "train_runtime" in logs:
            return
        if "loss" in logs:
            self._note = f"{_figures(logs)}  {memory_in_use()}"
            if self.progress.live:
                self._show(state)
            else:
                self.progress.say(f"step {state.global_step}/{state.max_steps}  {self._note}  {self._time_left(state)}")
        elif "eval_loss" in logs:
            self.progress.say(f"step {state.global_step}/{state.max_steps}  eval_loss {logs['eval_loss']:.4f}")

    def _show(self, state: TrainerState) -> None:
        if self.progress is not None and self._bar is not None:
            self.progress.set(self._bar, completed=state.global_step, note=self._note)

    def _time_left(self, state: TrainerState) -> str:
        step, moment = self._started
        done = state.global_step - step
        seconds = (time.monotonic() - moment) / max(done, 1) * (state.max_steps - state.global_step)
        return f"{_clock(seconds)} left"


def memory_in_use() -> str:
    """The peak of an accelerator's memory, or what the process holds."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / MiB:,.0f} MiB GPU peak"
    if torch.backends.mps.is_available():
        return f"{torch.mps.driver_allocated_memory() / MiB:,.0f} MiB GPU"
    import psutil  # type: ignore[import-untyped,unused-ignore]

    return f"{psutil.Process().memory_info().rss / MiB:,.0f} MiB"


def _figures(logs: dict[str, float]) -> str:
    parts = [f"loss {logs['loss']:.4f}", f"lr {logs.get('learning_rate', 0.0):.2e}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
