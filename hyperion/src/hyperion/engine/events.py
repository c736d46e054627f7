"""What happens in the loop, told to those who watch: metrics.jsonl, the observers, the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from hyperion_core.context import RunContext
    from hyperion_core.hooks import RunHooks

    from ..monitoring.metrics import MetricsFile


class RunEvents(TrainerCallback):
    """Writes each line of the log, and tells the observers.

    `after_evaluation` is called with the optimizer step after each evaluation.
    """

    def __init__(
        self, hooks: RunHooks, ctx: RunContext, metrics: MetricsFile, after_evaluation: Callable[[int], None]
    ) -> None:
        self.hooks = hooks
        self.ctx = ctx
        self.metrics = metrics
        self.after_evaluation = after_evaluation

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = dict(logs or {})
        if "train_runtime" in figures:  # the summary at the end of a run is no step's
            return
        self.metrics.append({"step": state.global_step, **figures})
        if "loss" in figures:
            self.hooks.observe("run_step", step=state.global_step, metrics=figures, ctx=self.ctx)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hooks.observe("run_evaluate", metrics=dict(metrics or {}), step=state.global_step, ctx=self.ctx)
        self.after_evaluation(state.global_step)
