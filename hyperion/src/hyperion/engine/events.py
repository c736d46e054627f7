"""What happens in the loop, told to those who watch: metrics.jsonl, timing.jsonl, the observers, the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from hyperion_core.context import RunContext
    from hyperion_core.hooks import RunHooks

    from ..monitoring.metrics import MetricsFile


# Figures that say how fast a machine was. They differ from run to run, and so have a file of their own.
_TIMES = ("runtime", "seconds", "_per_second")


class RunEvents(TrainerCallback):
    """Writes each line of the log, what was learnt apart from how fast it went, and tells the observers.

    `after_evaluation` is called with the optimizer step after each evaluation.
    """

    def __init__(
        self,
        hooks: RunHooks,
        ctx: RunContext,
        metrics: MetricsFile,
        timing: MetricsFile,
        after_evaluation: Callable[[int], None],
    ) -> None:
        self.hooks = hooks
        self.ctx = ctx
        self.metrics, self.timing = metrics, timing
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
        step = {"step": state.global_step}
        self.metrics.append({**step, **{name: value for name, value in figures.items() if not name.endswith(_TIMES)}})
        self.timing.append({**step, **{name: value for name, value in figures.items() if name.endswith(_TIMES)}})
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
