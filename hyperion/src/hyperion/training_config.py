"""`training:` of a config: the specification's names, and transformers' own for everything else.

The fields of `transformers.TrainingArguments` are read from its installed source, so that validating a config does
not import transformers, and a field is known exactly when the installed version has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from hyperion_core.config import StrictModel
from hyperion_core.errors import Problem
from hyperion_core.foreign import foreign_fields, foreign_keys, foreign_values, with_foreign_fields
from hyperion_core.suggest import did_you_mean
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

_ARGUMENTS = ("transformers", "training_args.py", "TrainingArguments")
_ELSEWHERE = "it is said elsewhere"
_REPLACED = "the engine does this its own way, so the field would do nothing"
_LATER = "this version runs one process on one device"
_INEXACT = "it would break exact resume"

_DISTRIBUTED = (
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "local_rank",
    "average_tokens_across_devices",
    "save_on_each_node",
    "log_on_each_node",
    "log_level_replica",
)
_ENGINES_OWN = (
    "include_for_metrics",
    "batch_eval_metrics",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "eval_accumulation_steps",
    "prediction_loss_only",
    "label_names",
    "length_column_name",
    "remove_unused_columns",
    "do_train",
    "do_eval",
    "do_predict",
    "debug",
    "skip_memory_metrics",
    "include_num_input_tokens_seen",
)

# Fields of TrainingArguments that are refused, each with (why, fix): a key that is accepted is honoured.
REFUSED: dict[str, tuple[str, str]] = {
    "output_dir": (_ELSEWHERE, "put output_dir at the top of the config, or use --output_dir"),
    "resume_from_checkpoint": (_ELSEWHERE, "use --resume, or Trainer.train(resume=True)"),
    "hub_token": ("a config is copied into the plan and published", "log in with `hf auth login`, or set HF_TOKEN"),
    "label_smoothing_factor": (
        "the loss is computed from the log-probabilities of the labels alone",
        "leave it out; it cannot be had in this version",
    ),
    "logging_nan_inf_filter": ("a loss that is not finite stops the run and says where", "leave it out"),
    "disable_tqdm": (_REPLACED, "leave it out: progress becomes plain lines when stderr is no terminal"),
    "use_liger_kernel": ("it patches transformers for the whole process", "leave it out"),
    "liger_kernel_config": ("it patches transformers for the whole process", "leave it out"),
    "torch_compile": ("the chunked loss was not shown to be exact under it", "leave it out"),
    "torch_compile_backend": ("the chunked loss was not shown to be exact under it", "leave it out"),
    "torch_compile_mode": ("the chunked loss was not shown to be exact under it", "leave it out"),
    "ignore_data_skip": (_INEXACT, "leave it out"),
    "save_only_model": (_INEXACT, "leave it out; use save_total_limit to save disk"),
    "restore_callback_states_from_checkpoint": (_INEXACT, "leave it out: --resume restores all state"),
    "auto_find_batch_size": (_INEXACT, "choose per_device_train_batch_size"),
    "enable_jit_checkpoint": (_REPLACED, "leave it out"),
    "use_cache": (_REPLACED, "leave it out"),
    "bf16_full_eval": ("evaluation uses the weights as they are trained", "set dtype at the top of the config"),
    "fp16_full_eval": ("evaluation uses the weights as they are trained", "set dtype at the top of the config"),
    "hub_strategy": ("the finished artifact is pushed, once", "leave it out"),
    "hub_always_push": ("the finished artifact is pushed, once", "leave it out"),
    "hub_revision": ("the finished artifact is pushed to the main branch", "leave it out"),
    "optim_target_modules": ("an adapter says what is trained", "choose adapter.target_modules"),
    "fsdp": (_LATER, "leave it out"),
    "fsdp_config": (_LATER, "leave it out"),
    "deepspeed": (_LATER, "leave it out"),
    "parallelism_config": (_LATER, "leave it out"),
    "accelerator_config": (_LATER, "leave it out"),
    **dict.fromkeys(_DISTRIBUTED, (_LATER, "leave it out")),
    **dict.fromkeys(_ENGINES_OWN, (_REPLACED, "leave it out")),
}

# Keys of this model that transformers' arguments do not have: they go elsewhere.
_OURS = frozenset(
    {
        "warmup_ratio",
        "lr_scheduler",
        "early_stopping_patience",
        "max_length",
        "eval_samples",
        "eval_samples_max_new_tokens",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
    }
)

Fraction = Annotated[float, Field(ge=0, lt=1)]


@with_foreign_fields(*_ARGUMENTS, leave_out=frozenset(REFUSED))
class TrainingConfig(StrictModel):
    """How the model is trained. Every field of `transformers.TrainingArguments` that is honoured may stand here."""

    num_train_epochs: PositiveFloat = Field(3.0, description="Passes over the training data.")
    max_steps: int = Field(-1, description="Optimizer steps; -1 leaves it to num_train_epochs.")
    per_device_train_batch_size: PositiveInt = Field(8, description="Rows in a micro-batch.")
    per_device_eval_batch_size: PositiveInt = Field(8, description="Rows in a batch of evaluation.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Micro-batches in an optimizer step.")
    max_length: PositiveInt = Field(1024, description="Tokens of a row that are kept, at most.")
    learning_rate: PositiveFloat = Field(2e-4, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Gradients are clipped to this norm; 0 clips nothing.")
    lr_scheduler: str | dict[str, Any] = Field(
        "cosine", description="A scheduler's name, or a mapping of `type` and its options."
    )
    lr_scheduler_type: str | None = Field(None, description="transformers' name for lr_scheduler.")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(None, description="transformers' name for its options.")
    warmup_ratio: Fraction | None = Field(None, description="Share of the steps that warm up.")
    warmup_steps: NonNegativeFloat | None = Field(None, description="Steps that warm up; below 1, a share.")
    neftune_noise_alpha: PositiveFloat | None = Field(None, description="Noise on embeddings (NEFTune, 2310.05914).")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations without a better metric_for_best_model."
    )
    eval_steps: PositiveFloat | None = Field(None, description="Evaluate every so many steps; below 1, a share.")
    save_steps: PositiveFloat | None = Field(None, description="A checkpoint every so many steps; below 1, a share.")
    logging_steps: PositiveFloat = Field(10, description="A line in metrics.jsonl every so many steps.")
    save_total_limit: PositiveInt | None = Field(2, description="Checkpoints kept; the best one is always kept.")
    eval_samples: NonNegativeInt = Field(3, description="Answers generated and shown at each evaluation.")
    eval_samples_max_new_tokens: PositiveInt = Field(64, description="Length of each of them, in tokens.")
    seed: NonNegativeInt = Field(42, lt=2**32, description="Of initialisation, dropout, data order and split.")
    push_to_hub: bool = Field(False, description="Upload the finished artifact.")
    hub_model_id: str | None = Field(None, description="owner/name to upload to; required with push_to_hub.")
    hub_private_repo: bool | None = Field(None, description="Create the repository as a private one.")
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None, description="When to evaluate; by default eval_steps, or every epoch."
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = Field(
        None, description="When to write a checkpoint; by default save_steps, or with each evaluation."
    )
    logging_strategy: Literal["no", "steps", "epoch"] | None = Field(None, description="When to log.")
    metric_for_best_model: Literal["eval_loss", "loss"] = Field(
        "eval_loss", description="What the best model is judged by."
    )
    load_best_model_at_end: bool | None = Field(
        None, description="Keep the best model, not the last; by default whenever there is an evaluation."
    )
    optim: str | None = Field(None, description="The optimizer, by transformers' name.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        "random", description="Order of the rows in an epoch."
    )

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        found = [Problem(key, f'"{key}" is not taken', why, fix) for key, (why, fix) in REFUSED.items() if key in data]
        found += _both(data, "warmup_ratio", "warmup_steps", "they say the same thing twice")
        found += _both(data, "lr_scheduler", "lr_scheduler_type", "they say the same thing twice")
        found += _both(data, "bf16", "fp16", "autocast has one type")
        optimizers = foreign_values("transformers", "training_args.py", "OptimizerNames")
        if isinstance(data.get("optim"), str) and data["optim"] not in optimizers:
            found.append(
                Problem(
                    "optim", f'no optimizer is called "{data["optim"]}"', fix=did_you_mean(data["optim"], optimizers)
                )
            )
        found += _tracker_problems(data.get("report_to"))
        if data.get("max_steps") == 0:
            found.append(Problem("max_steps", "0 steps train nothing", fix="give a number above 0, or -1"))
        if isinstance(data.get("lr_scheduler"), dict) and data.get("lr_scheduler_kwargs"):
            found.append(
                Problem(
                    "lr_scheduler_kwargs", "the scheduler's options stand in two places", fix="put them in lr_scheduler"
                )
            )
        found += _evaluation_contradictions(data)
        if data.get("push_to_hub") and not data.get("hub_model_id"):
            found.append(Problem("hub_model_id", "push_to_hub needs hub_model_id", fix="hub_model_id: owner/name"))
        return found

    @classmethod
    def allowed_keys(cls) -> list[str]:
        return [name for name in super().allowed_keys() if name not in REFUSED]

    def scheduler(self) -> dict[str, Any]:
        """The chosen scheduler as a mapping of `type` and its options."""
        chosen = self.lr_scheduler_type or self.lr_scheduler
        if isinstance(chosen, str):
            return {"type": chosen, **(self.lr_scheduler_kwargs or {})}
        return dict(chosen)

    def arguments(self, *, evaluates: bool) -> dict[str, Any]:
        """Keyword arguments for `transformers.TrainingArguments`, without output_dir."""
        arguments = {name: value for name, value in self.given().items() if name not in _OURS and value is not None}
        for name in (
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "logging_steps",
            "save_total_limit",
            "seed",
            "train_sampling_strategy",
        ):
            arguments[name] = getattr(self, name)
        if self.warmup_ratio is not None:
            has_ratio = "warmup_ratio" in foreign_fields(*_ARGUMENTS)
            arguments["warmup_ratio" if has_ratio else "warmup_steps"] = self.warmup_ratio
        arguments["eval_strategy"] = self.eval_strategy_in_force(evaluates)
        arguments["save_strategy"] = self.save_strategy_in_force(evaluates)
        if self.save_steps is None and arguments["save_strategy"] == "steps" and self.eval_steps is not None:
            arguments["save_steps"] = self.eval_steps
        if not evaluates:
            for name in ("eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model", "greater_is_better"):
                arguments.pop(name, None)
        arguments["load_best_model_at_end"] = self.keeps_best(evaluates)
        if self.keeps_best(evaluates):
            arguments["metric_for_best_model"] = self.metric_for_best_model
        return arguments

    def eval_strategy_in_force(self, evaluates: bool) -> str:
        """ "steps", "epoch" or "no": as said, else by eval_steps, else every epoch; "no" without evaluation data."""
        if not evaluates:
            return "no"
        return self.eval_strategy or ("steps" if self.eval_steps else "epoch")

    def save_strategy_in_force(self, evaluates: bool) -> str:
        """As said, else by save_steps, else together with the evaluation, else every epoch."""
        said = self.save_strategy or ("steps" if self.save_steps else None)
        if said:
            return said
        strategy = self.eval_strategy_in_force(evaluates)
        return strategy if strategy != "no" else "epoch"

    def keeps_best(self, evaluates: bool) -> bool:
        """Whether the best model is kept, not the last: as said, else whenever there is an evaluation to judge by."""
        said = self.load_best_model_at_end
        judged = evaluates and self.eval_strategy_in_force(evaluates) != "no"
        return bool(said if said is not None else judged and self.save_strategy_in_force(evaluates) != "no")


def _both(data: Mapping[str, Any], one: str, other: str, why: str) -> list[Problem]:
    if data.get(one) and data.get(other):
        return [Problem(one, f'"{one}" and "{other}" stand together', why, "keep one of them")]
    return []


def _tracker_problems(report_to: Any) -> list[Problem]:
    """transformers would find out only when the model is loaded."""
    known = foreign_keys("transformers", "integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    found = []
    for name in [report_to] if isinstance(report_to, str) else report_to if isinstance(report_to, list) else []:
        if name in ("none", "all") or not isinstance(name, str):
            continue
        module = {"azure_ml": "azureml"}.get(name, name)
        if name not in known:
            found.append(Problem("report_to", f'no tracker is called "{name}"', fix=did_you_mean(name, known)))
        elif importlib.util.find_spec(module) is None:
            found.append(
                Problem("report_to", f'the tracker "{name}" is not installed', fix=f"python -m pip install {module}")
            )
    return found


def _evaluation_contradictions(data: Mapping[str, Any]) -> list[Problem]:
    found = []
    if data.get("eval_steps") and data.get("eval_strategy") in ("no", "epoch"):
        found.append(
            Problem(
                "eval_steps",
                f'eval_steps stands beside eval_strategy "{data["eval_strategy"]}"',
                "the steps would never be used",
                "remove one of them",
            )
        )
    if data.get("save_steps") and data.get("save_strategy") in ("no", "epoch", "best"):
        found.append(
            Problem(
                "save_steps",
                f'save_steps stands beside save_strategy "{data["save_strategy"]}"',
                "the steps would never be used",
                "remove one of them",
            )
        )
    if data.get("early_stopping_patience") and data.get("eval_strategy") == "no":
        found.append(
            Problem(
                "early_stopping_patience",
                "nothing is evaluated, so nothing can stop early",
                fix="remove eval_strategy: no",
            )
        )
    return found
