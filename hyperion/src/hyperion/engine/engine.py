"""The training loop: `transformers.Trainer`, with loss, optimizer, schedule, data order and checkpoints of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hyperion_core.artifact import read_json, write_json
from hyperion_core.errors import TrainingError
from hyperion_core.facts import Horizon, Segments
from torch import Tensor
from torch.nn import Module
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from .arguments import optimizer_class
from .checkpoints import ADAPTER_FOLDER, checkpoint_path, rotate, writing_checkpoint
from .figures import Figures
from .loss import check_head, count_supervised, supervised_logprobs
from .random_state import untouched_generators
from .sampler import EpochSampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from hyperion_core.config import AdapterConfig, PluginConfig
    from hyperion_core.context import RunContext
    from hyperion_core.hooks import RunHooks
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import TrainerControl, TrainerState

ADAPTER_NAME = "default"
TRAINER_STATE = "trainer_state.json"
ENGINE_STATE = "engine_state.json"


class Engine(Trainer):
    """One run on one device.

    Args:
        model: base with the adapter attached as "default"; moved to the device.
        adapter, objective, scheduler: (name of the plugin in `hooks`, its config).
        train, evaluation: rows with input_ids, labels (-100 = not learnt) and length.
        collator: rows to a batch of input_ids, attention_mask, labels.
    """

    # compute_loss divides by the supervised tokens of the whole optimizer step: nothing is left to scale
    loss_is_scaled_for_ga = True
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Module,
        args: TrainingArguments,
        *,
        hooks: RunHooks,
        ctx: RunContext,
        adapter: tuple[str, AdapterConfig],
        objective: tuple[str, PluginConfig],
        scheduler: tuple[str, PluginConfig],
        train: Dataset,
        evaluation: Dataset | None,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.hooks = hooks
        self.ctx = ctx
        self.adapter, self.adapter_config = hooks.adapter(adapter[0]), adapter[1]
        self.objective, self.objective_config = hooks.objective(objective[0]), objective[1]
        self.scheduler, self.scheduler_config = hooks.scheduler(scheduler[0]), scheduler[1]
        # transformers' own rotation may delete the newest checkpoint at the end of a run: ours keeps it
        self.checkpoint_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[_LoopEvents(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.figures = Figures(args.device)
        self._resume: Path | None = None
        self._needs_reference = bool(self.objective.objective_needs_reference(config=self.objective_config))

    # --- the loss ---

    def compute_loss(
        self,
        model: Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A micro-batch's share of its optimizer step's loss.

        Raises:
            TrainingError: the loss is not a finite number.
        """
        supervised = count_supervised(inputs["labels"])
        normalizer = supervised.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, metrics = self._objective_loss(model, inputs, normalizer)
        if model.training:
            penalty = self.adapter.adapter_loss(model=self.model, name=ADAPTER_NAME)
            if penalty is not None:
                loss = loss + penalty / self.current_gradient_accumulation_steps
            self._require_finite(loss)
            self.figures.count(inputs, supervised)
            self.figures.add_metrics(metrics)
        return (loss, None) if return_outputs else loss

    def _objective_loss(
        self, model: Module, inputs: Mapping[str, Any], normalizer: Tensor | int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reference = self._reference(model, inputs) if self._needs_reference else None
        with self.accelerator.autocast():
            found = supervised_logprobs(model, inputs)
            roles = ("only",) * inputs["labels"].shape[0]
            return self.objective.objective_loss(
                config=self.objective_config,
                logps=found.logps,
                segments=Segments(found.sequence, found.token, roles),
                reference=reference,
                normalizer=torch.as_tensor(normalizer, device=found.logps.device),
            )

    def _reference(self, model: Module, inputs: Mapping[str, Any]) -> Tensor:
        # in an autocast block of its own: autocast would hand weights that it cast here, without gradient, on to
        # the pass that trains them
        training = model.training
        model.eval()
        self.adapter.adapter_activate(model=self.model, weights={})
        try:
            with torch.no_grad(), self.accelerator.autocast():
                return supervised_logprobs(model, inputs).logps
        finally:
            self.adapter.adapter_activate(model=self.model, weights={ADAPTER_NAME: 1.0})
            model.train(training)

    def _require_finite(self, value: Tensor, what: str = "loss") -> None:
        if bool(torch.isfinite(value).all()):
            return
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        raise TrainingError(
            f"the {what} is {value.item()} at optimizer step {self.state.global_step + 1}",
            why=f"the numbers ran out of range (learning rate {rate:.3g}); going on would ruin the adapter",
            fix="lower training.learning_rate, warm up longer, set training.max_grad_norm, or train in float32 "
            "(no bf16 or fp16)",
        )

    def check_head(self) -> None:
        """Compare the chunked loss with the model's own logits on the first row.

        Raises:
            TrainingError: they differ.
        """
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
        with untouched_generators(), self.accelerator.autocast():
            check_head(self.model, batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Supervised tokens of the whole optimizer step; 1 where there are none, so that their loss is 0."""
        counts = [count_supervised(batch["labels"]) for batch in batch_samples]
        total = torch.stack(counts).sum() if counts else torch.ones((), dtype=torch.int64)
        return total.clamp(min=1).to(device)

    # --- data order, optimizer, schedule ---

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy = str(self.args.train_sampling_strategy)
        return EpochSampler(
            len(rows),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            strategy=strategy,
            lengths=list(rows["length"]) if strategy == "group_by_length" else (),
            group=self.args.train_batch_size * self.args.gradient_accumulation_steps,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.SequentialSampler:
        return torch.utils.data.SequentialSampler(eval_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of every row: dataloader_drop_last is for training."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropping

    def create_optimizer(self, model: Module | None = None) -> Optimizer:
        """The optimizer that `optim` names, over the adapter's parameter groups.

        Raises:
            TrainingError: the groups are not exactly what is trainable, or `optim` wants groups of its own.
        """
        if self.optimizer is not None:
            return self.optimizer
        groups = self.adapter.adapter_param_groups(model=self.model, name=ADAPTER_NAME, config=self.adapter_config)
        self._require_all_trainables([name for group in groups for name, _ in group.parameters], groups)
        chosen, options = optimizer_class(self.args)
        self.optimizer = chosen(
            [
                {
                    "params": [parameter for _, parameter in group.parameters],
                    "lr": self.args.learning_rate * group.lr_ratio,
                    "weight_decay": self.args.weight_decay if group.weight_decay is None else group.weight_decay,
                }
                for group in groups
                if group.parameters
            ],
            **options,
        )
        return self.optimizer

    def _require_all_trainables(self, names: list[str], groups: Sequence[Any]) -> None:
        trainable = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        grouped = [id(parameter) for group in groups for _, parameter in group.parameters]
        if len(grouped) == len(set(grouped)) and set(grouped) == set(trainable) and grouped:
            return
        left_out = [name for key, name in trainable.items() if key not in set(grouped)]
        raise TrainingError(
            "the adapter's parameter groups are not what is trainable in the model",
            why=f"{len(trainable)} tensors are trainable, its groups hold {len(set(grouped))} in {len(grouped)} entries"
            + (f"; left out: {', '.join(left_out[:5])}" if left_out else ""),
            fix="tell the authors of the adapter plugin: adapter_param_groups must give each trainable parameter once",
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            plain = getattr(chosen, "optimizer", chosen)  # accelerate's wrapper is no business of a plugin's
            horizon = Horizon(num_training_steps, self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = self.scheduler.scheduler_build(
                config=self.scheduler_config, optimizer=plain, horizons=[horizon] * len(plain.param_groups)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_grad_norm(self, model: Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # a gradient scaler skips such a step, and tries a lower scale
            self._require_finite(torch.as_tensor(norm), "gradient")
        return norm

    # --- evaluation and log ---

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers does, but without a trace in the random numbers that training draws."""
        with self.figures.paused(), untouched_generators():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and metrics over all supervised tokens of the set: long rows count for more than short ones.

        Raises:
            TrainingError: there are none.
        """
        model = self.model
        model.eval()
        if callable(switch := getattr(self.optimizer, "eval", None)):
            switch()
        sums: dict[str, float] = {"loss": 0.0}
        total = 0
        with self.ctx.progress.task("evaluating", len(dataloader)) as advance, torch.no_grad():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                count = count_supervised(inputs["labels"])
                loss, metrics = self._objective_loss(model, inputs, count.clamp(min=1))
                weight = int(count)
                total += weight
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * weight
                advance(1)
        if not total:
            raise TrainingError(
                "the evaluation data hold no token to predict",
                why=f"none of their {len(dataloader.dataset)} rows has a supervised token: there is no loss to measure",
                fix="check that their answers survive training.max_length, or train without evaluation data",
            )
        found = {f"{metric_key_prefix}_{name}": value / total for name, value in sums.items()}
        return EvalLoopOutput(None, None, found, len(dataloader.dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.figures.line(self._steps_to_log))
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._steps_to_log = max(self.state.global_step - self._globalstep_last_logged, 1)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True  # or the best model would be lost where save_steps passes it over
        return better

    # --- checkpoints ---

    def _save_checkpoint(self, model: Module, trial: Any) -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        final = checkpoint_path(output, step)
        self.store_flos()
        with self.figures.paused(), writing_checkpoint(output, step) as folder:
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


class _LoopEvents(TrainerCallback):
    """The engine's own places in the loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.engine.restore_sums()
        self.engine.figures.start()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.engine.adapter.adapter_after_step(
            model=self.engine.model, name=ADAPTER_NAME, step=state.global_step + 1, total=state.max_steps
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # the end of a run is logged and judged, whatever the intervals
            control.should_log = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"
