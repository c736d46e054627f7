"""The training loop: `transformers.Trainer`, with loss, optimizer, schedule, data order and checkpoints of our own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hyperion_core.errors import TrainingError
from hyperion_core.facts import Horizon, Segments
from torch import Tensor
from torch.nn import Module
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..acceleration.documents import DOCUMENTS
from ..acceleration.packing import attending_within_documents, why_not_packed
from .arguments import optimizer_class
from .batches import Batching, RowBatch
from .checkpointing import ADAPTER_NAME, CheckpointedTrainer
from .figures import Figures
from .loss import check_head, count_supervised, supervised_logprobs
from .random_state import untouched_generators
from .sampler import EpochSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from hyperion_core.config import AdapterConfig, PluginConfig
    from hyperion_core.context import RunContext
    from hyperion_core.hooks import RunHooks
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import TrainerControl, TrainerState

    from ..monitoring.metrics import MetricsFile
    from .interruption import Interruption


class Engine(CheckpointedTrainer):
    """One run on one device.

    Args:
        model: base with the adapter attached as "default"; moved to the device.
        adapter, objective, scheduler: (name of the plugin in `hooks`, its config).
        train, evaluation: rows with input_ids, labels (-100 = not learnt) and length.
        batching: rows of an optimizer step to micro-batches.
        interruption: knows whether a signal asked for the end.
        logs: files of lines that a resumed run cuts back to its checkpoint.
    """

    # compute_loss divides by the supervised tokens of the whole optimizer step: nothing is left to scale
    loss_is_scaled_for_ga = True

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
        batching: Batching,
        interruption: Interruption,
        logs: Sequence[MetricsFile] = (),
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
            data_collator=RowBatch,
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[_LoopEvents(self), *callbacks, _ResumedStep(self)],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.batching = batching
        self.figures = Figures(args.device)
        self.interruption, self.logs = interruption, tuple(logs)
        self._needs_reference = bool(self.objective.objective_needs_reference(config=self.objective_config))

    # --- micro-batches ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, in as many lists as the loader gave batches, and its supervised
        tokens."""
        with self.figures.waiting():
            lists = self.batching(list(itertools.islice(epoch_iterator, num_batches)))
        self._micro_batches = max(1, sum(map(len, lists)))
        counts = [count_supervised(batch["labels"]) for part in lists for batch in part]
        total = torch.stack(counts).sum() if counts else torch.ones((), dtype=torch.int64)
        return lists, total.clamp(min=1).to(device)  # where there are none, their loss is 0

    def training_step(self, model: Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of each micro-batch; gives the sum of their losses."""
        total = torch.zeros((), device=self.args.device)
        with self._attention():
            for batch in inputs:
                total = total + super().training_step(model, batch, num_items_in_batch)
        return total

    def floating_point_ops(self, inputs: Any) -> int:
        return sum(int(super(Engine, self).floating_point_ops(batch)) for batch in inputs)

    def _attention(self) -> AbstractContextManager[None]:
        return nullcontext() if self.batching.capacity is None else attending_within_documents(self.model)

    def settle_packing(self, longest: int, *, required: bool) -> None:
        """Give up packing where this model cannot be given packs, with rows of up to `longest` tokens.

        Raises:
            TrainingError: it cannot, and packing is `required`.
        """
        if self.batching.capacity is None:
            return
        with self.accelerator.autocast():
            rows = [self.train_dataset[number] for number in range(min(2, len(self.train_dataset)))]
            why = why_not_packed(self.model, rows, longest)
        if not why:
            return
        if required:
            raise TrainingError(
                f"the rows cannot be packed for {type(self.model).__name__}", why=why,
                fix="leave training.packing out, or set it to false: batches are padded then",
            )  # fmt: skip
        self.ctx.log.warning("rows are padded, not packed: %s", why)
        self.batching = replace(self.batching, capacity=None)

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
                loss = loss + penalty / self._micro_batches
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
            documents = inputs.get(DOCUMENTS)
            rows = inputs["labels"].shape[0] if documents is None else len(documents.lengths)
            return self.objective.objective_loss(
                config=self.objective_config,
                logps=found.logps,
                segments=Segments(found.sequence, found.token, ("only",) * rows),
                scores=found.scores,
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
        batch = self._prepare_inputs(self.batching.pad([self.train_dataset[0]]))
        with untouched_generators(), self.accelerator.autocast():
            check_head(self.model, batch)

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
        device = self.args.device.type
        if options.get("is_paged") and device != "cuda":
            name = self.args.optim.value
            self.ctx.log.warning("%s: nothing is paged on %s; the optimizer's state stays in memory", name, device)
            options["is_paged"] = False
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
                self.interruption.leave_evaluation()
                for part in self.batching([batch])[0]:
                    inputs = self._prepare_inputs(part)
                    count = count_supervised(inputs["labels"])
                    with self._attention():
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True  # or the best model would be lost where save_steps passes it over
        return better


class _LoopEvents(TrainerCallback):
    """The engine's own places in the loop, before anybody else's."""

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

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.engine.at_epoch_end(False)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        self.engine.at_epoch_end(True)


class _ResumedStep(TrainerCallback):
    """When all others are ready: the rest of the step that a checkpoint stands in, and whether it was the last one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.engine.finish_step()
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
