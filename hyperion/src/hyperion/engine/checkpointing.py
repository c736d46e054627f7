"""The engine's other half: what ends an optimizer step, checkpoints, and going on from one to the bit.

An optimizer step is followed by what is due: a line of the log, an evaluation, a checkpoint; then, at the end of an
epoch, by what is due there. A checkpoint records in `left` what of this had not been done when it was written, and
the run that is resumed from it does that first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import read_json, write_json
from hyperion_core.errors import TrainingError
from torch.nn import Module
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..disk import writing
from .checkpoints import ADAPTER_FOLDER, checkpoint_path, rotate, writing_checkpoint
from .interruption import EvaluationLeft, Interrupted, Interruption

if TYPE_CHECKING:
    from hyperion_core.context import RunContext
    from hyperion_core.hooks import RunHooks

    from ..monitoring.metrics import MetricsFile
    from .figures import Figures

ADAPTER_NAME = "default"
TRAINER_STATE = "trainer_state.json"
ENGINE_STATE = "engine_state.json"
EVALUATION, SAVE, EPOCH_END = "evaluation", "save", "epoch end"


class CheckpointedTrainer(Trainer):
    """A trainer whose checkpoints hold all that its run needs to go on."""

    hooks: RunHooks
    ctx: RunContext
    figures: Figures
    adapter: Any
    adapter_config: Any
    optimizer: Any
    lr_scheduler: Any
    control: Any
    interruption: Interruption
    logs: tuple[MetricsFile, ...]
    checkpoint_limit: int | None
    _resume: Path | None = None
    _in_epoch_end = False
    _left: tuple[str, ...] = ()
    # of the step that was made last, for a line of the log that a resumed run has still to write
    _step_figures: dict[str, float | None]
    _log_sizes: dict[str, int]

    # --- the end of an optimizer step ---

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Any,
        grad_norm: Any,
        model: Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """What is due after a step, and after an epoch; ends the run where a signal asked for it.

        Raises:
            Interrupted: behind a checkpoint.
        """
        given = (tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)
        self._step_figures = {
            "grad_norm": None if grad_norm is None else float(grad_norm), "learning_rate": learning_rate
        }  # fmt: skip
        self._steps_to_log = max(self.state.global_step - self._globalstep_last_logged, 1)
        control = self.control
        evaluates, saves = control.should_evaluate, control.should_save
        due = (*((EVALUATION,) if evaluates else ()), *((SAVE,) if saves else ()))
        control.should_evaluate = control.should_save = False
        super()._maybe_log_save_evaluate(*given)  # the line of the log
        if evaluates:  # should it be left, what was logged of it does not count
            self._log_sizes = self._sizes_of_logs()
        if self.interruption.requested:
            self._save_and_end(model, due)
        self._left = ()
        control.should_log, control.should_evaluate, control.should_save = False, evaluates, saves
        try:
            super()._maybe_log_save_evaluate(*given)
        except EvaluationLeft:
            step = self.state.global_step
            self.state.log_history = [line for line in self.state.log_history if not _is_evaluation(line, step)]
            self._save_and_end(model, due)
        if self.interruption.requested:
            self._save_and_end(model, ())

    def _save_and_end(self, model: Module, left: tuple[str, ...]) -> None:
        assert self.interruption.signum is not None
        self._left = left
        self._save_checkpoint(model, None)
        raise Interrupted(self.interruption.signum, self._checkpoint_path())

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # it does in a run that is resumed at its very end
            super()._run_epoch(*args, **kwargs)

    def finish_step(self) -> None:
        """Do what the checkpoint that is resumed had left to do, in the order in which it was due."""
        if self._resume is None:
            return
        state = read_json(self._resume / ENGINE_STATE)
        left, figures, control = state["left"], state["step_figures"], self.control
        self.at_epoch_end(state["in_epoch_end"])
        if left:  # what is written now holds the random numbers with which the run goes on
            self._load_rng_state(str(self._resume))
        control.should_log, control.should_evaluate, control.should_save = False, EVALUATION in left, SAVE in left
        if EVALUATION in left or SAVE in left:
            self._finish(figures)
        stops = bool(left) and control.should_training_stop  # the evaluation that was made up for may have decided so
        if EPOCH_END in left or (stops and not state["in_epoch_end"]):
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, control)
            self._finish(figures)

    def _finish(self, figures: Mapping[str, float | None]) -> None:
        self._maybe_log_save_evaluate(
            self._tr_loss, figures["grad_norm"], self.model, None, self.state.epoch or 0.0, None, 0.0,
            learning_rate=figures["learning_rate"],
        )  # fmt: skip

    def at_epoch_end(self, reached: bool) -> None:
        """Tells the events of an epoch's end from those of its last step."""
        self._in_epoch_end = reached

    def _still_to_do(self) -> list[str]:
        """What the step has left to do when a checkpoint is written."""
        ends = float(self.state.epoch or 0.5).is_integer() or self.control.should_training_stop
        return [*self._left, *([EPOCH_END] if ends and not self._in_epoch_end else [])]

    def _sizes_of_logs(self) -> dict[str, int]:
        return {log.path.name: log.size() for log in self.logs}

    # --- checkpoints ---

    def _save_checkpoint(self, model: Module, trial: Any) -> None:
        output, step, final = Path(self.args.output_dir), self.state.global_step, self._checkpoint_path()
        if EVALUATION not in self._left:
            self._log_sizes = self._sizes_of_logs()
        self.store_flos()
        with self.figures.paused(), writing(final.name, output), writing_checkpoint(output, step) as folder:
            self._set_best_checkpoint(written=final)
            (folder / ADAPTER_FOLDER).mkdir()
            self.adapter.adapter_save(
                model=self.model, name=ADAPTER_NAME, config=self.adapter_config,
                folder=folder / ADAPTER_FOLDER, for_resume=True,
            )  # fmt: skip
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE))
            write_json(folder / ENGINE_STATE, self._sums())
        best = self.state.best_model_checkpoint
        rotate(output, self.checkpoint_limit, keep={final, *([Path(best)] if best else [])})
        self.hooks.observe("run_checkpoint", path=final, step=step, ctx=self.ctx)

    def _checkpoint_path(self) -> Path:
        return checkpoint_path(Path(self.args.output_dir), self.state.global_step)

    def _set_best_checkpoint(self, written: Path | None = None) -> None:
        best = self.state.best_global_step
        path = checkpoint_path(Path(self.args.output_dir), best) if best else None
        self.state.best_model_checkpoint = (
            str(path) if path is not None and (path == written or path.is_dir()) else None
        )

    def _sums(self) -> dict[str, Any]:
        """What transformers forgets at a checkpoint: the losses since the last line of the log, and our figures."""
        return {
            "loss_sum": float(self._tr_loss),
            "loss_total": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "figures": self.figures.state(),
            "step_figures": self._step_figures,
            "left": self._still_to_do(),
            "in_epoch_end": self._in_epoch_end,
            "log_sizes": self._log_sizes,
        }

    def restore_sums(self) -> None:
        """Go on with the sums of the checkpoint that is resumed; called when the loop has set them to 0."""
        if self._resume is None:
            return
        sums = read_json(self._resume / ENGINE_STATE)
        self._tr_loss += sums["loss_sum"]
        self._total_loss_scalar = sums["loss_total"]
        self._globalstep_last_logged = sums["logged_step"]
        self._initial_global_step = 0
        self.figures.load_state(sums["figures"])

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._resume = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        started = super()._init_training_state(*args, **kwargs)
        self._set_best_checkpoint()  # the folder may have moved since the checkpoint was written
        return started

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, RuntimeError) as error:
            raise TrainingError(
                f"the optimizer of {checkpoint} does not fit this run",
                why=str(error),
                fix="resume with the adapter, optimizer and scheduler that the run began with, or start anew elsewhere",
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Module | None = None) -> None:
        """Nothing: the adapter was loaded through its plugin before the engine was made."""

    def _load_best_model(self) -> None:
        """Nothing: `fit` loads it through the adapter's plugin when the loop has let go of the model."""


def log_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each log that belong to a checkpoint, by the file's name; what follows them is written again."""
    sizes: dict[str, int] = read_json(checkpoint / ENGINE_STATE)["log_sizes"]
    return sizes


def _is_evaluation(line: dict[str, Any], step: int) -> bool:
    return line.get("step") == step and any(key.startswith("eval_") for key in line)
