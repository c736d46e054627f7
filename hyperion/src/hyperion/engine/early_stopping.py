"""Stopping when evaluations no longer get better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def evaluation_key(metric: str) -> str:
    """The name that a metric bears in evaluation results: "loss" is "eval_loss"."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def evaluations_since_best(history: Iterable[Mapping[str, Any]], metric: str, greater_is_better: bool) -> int:
    """Evaluations in a log after the best one; of equal ones the first is the best."""
    key = evaluation_key(metric)
    values = [line[key] if greater_is_better else -line[key] for line in history if key in line]
    return len(values) - 1 - values.index(max(values)) if values else 0


class EarlyStopping(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a better `metric_for_best_model`.

    It counts in the trainer's log, which a checkpoint carries, so that a resumed run stops where the other would.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that is resumed where it had stopped stays there."""
        self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        metric, greater = args.metric_for_best_model or "loss", bool(args.greater_is_better)
        if evaluations_since_best(state.log_history, metric, greater) >= self.patience:
            control.should_training_stop = True
