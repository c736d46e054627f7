"""`training:` of a config: the specification's names, and transformers' own for everything else.

The fields of `transformers.TrainingArguments` are read from its installed source, so that validating a config does
not import transformers, and a field is known exactly when the installed version has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from hyperion_core.config import StrictModel
from hyperion_core.errors import Problem
from hyperion_core.foreign import foreign_fields, with_foreign_fields
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .models.hardware import plan_device
from .refused_arguments import REFUSED, argument_problems

_ARGUMENTS = ("transformers", "training_args.py", "TrainingArguments")

# Keys of this model that transformers' arguments do not have: they go elsewhere.
_OURS = frozenset(
    {
        "warmup_ratio",
        "lr_scheduler",
        "early_stopping_patience",
        "max_length",
        "eval_samples",
        "eval_samples_max_new_tokens",
        "packing",
        "recompute_layers",
        "stream_weights",
        "offload_activations",
        "memory_check",
        "pack_length",
        "fused_layers",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
    }
)


def _share_or_whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("below 1 it is a share of the run, above a number of steps, which must be whole")
    return value


_MOST = 2**31 - 1  # of whatever is counted: more is a slip, and libraries count in 32 bits
Fraction = Annotated[float, Field(ge=0, lt=1)]
StepsOrShare = Annotated[PositiveFloat, AfterValidator(_share_or_whole)]


@with_foreign_fields(*_ARGUMENTS, leave_out=frozenset(REFUSED))
class TrainingConfig(StrictModel):
    """How the model is trained. Every field of `transformers.TrainingArguments` that is honoured may stand here."""

    model_config = ConfigDict(allow_inf_nan=False)

    num_train_epochs: PositiveFloat = Field(3.0, le=1_000_000, description="Passes over the training data.")
    max_steps: int = Field(-1, ge=-1, le=_MOST, description="Optimizer steps; -1 leaves it to num_train_epochs.")
    per_device_train_batch_size: PositiveInt = Field(8, le=_MOST, description="Rows in a micro-batch.")
    per_device_eval_batch_size: PositiveInt = Field(8, le=_MOST, description="Rows in a batch of evaluation.")
    gradient_accumulation_steps: PositiveInt = Field(1, le=_MOST, description="Micro-batches in an optimizer step.")
    max_length: PositiveInt | None = Field(
        None, description="Tokens of a row that are kept; by default 1024, or what the model reads if that is less."
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Gradients are clipped to this norm; 0 clips nothing.")
    lr_scheduler: str | dict[str, Any] = Field(
        "cosine", description="A scheduler's name, or a mapping of `type` and its options."
    )
    lr_scheduler_type: str | None = Field(None, description="transformers' name for lr_scheduler.")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(None, description="transformers' name for its options.")
    warmup_ratio: Fraction | None = Field(None, description="Share of the steps that warm up.")
    warmup_steps: Annotated[NonNegativeFloat, AfterValidator(_share_or_whole)] | None = Field(
        None, description="Steps that warm up; below 1, a share."
    )
    neftune_noise_alpha: PositiveFloat | None = Field(None, description="Noise on embeddings (NEFTune, 2310.05914).")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations without a better metric_for_best_model."
    )
    eval_steps: StepsOrShare | None = Field(None, description="Evaluate every so many steps; below 1, a share.")
    save_steps: StepsOrShare | None = Field(None, description="A checkpoint every so many steps; below 1, a share.")
    logging_steps: StepsOrShare = Field(
        10, description="A line in metrics.jsonl every so many steps; below 1, a share."
    )
    save_total_limit: PositiveInt | None = Field(2, description="Checkpoints kept; the best one is always kept.")
    eval_samples: NonNegativeInt = Field(3, description="Answers generated and shown at each evaluation.")
    eval_samples_max_new_tokens: PositiveInt = Field(64, description="Length of each of them, in tokens.")
    seed: NonNegativeInt = Field(42, lt=2**32, description="Of initialisation, dropout and data order.")
    push_to_hub: bool = Field(False, description="Upload the finished artifact.")
    hub_model_id: str | None = Field(None, description="owner/name to upload to; by default the output folder's name.")
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
    optim: str | None = Field(
        None, description="The optimizer, by transformers' name; or muon, which moves an adapter's matrices in all"
        " directions alike, by AdamW's learning rates and with half of its memory.",
    )  # fmt: skip
    adam_beta1: Fraction | None = Field(None, description="AdamW: decay of the mean of gradients. muon: its momentum.")
    adam_beta2: Fraction | None = Field(None, description="AdamW: decay of the mean of their squares.")
    adam_epsilon: PositiveFloat | None = Field(None, description="AdamW: added to the divisor.")
    data_seed: Annotated[NonNegativeInt, Field(lt=2**32)] | None = Field(
        None, description="Of the data order; by default seed."
    )
    eval_delay: NonNegativeFloat | None = Field(None, description="Epochs or steps before the first evaluation.")
    dataloader_num_workers: NonNegativeInt | None = Field(None, description="Processes that prepare batches.")
    dataloader_prefetch_factor: PositiveInt | None = Field(None, description="Batches that each of them keeps ready.")
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = Field(
        None, description="How they are started."
    )
    torch_empty_cache_steps: PositiveInt | None = Field(
        None, description="Give unused GPU memory back every so many steps."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = Field(None, description="Options of gradient_checkpointing.")
    activation_checkpointing_kwargs: dict[str, Any] | None = Field(
        None, description="Options of activation_checkpointing, transformers' newer name for gradient_checkpointing."
    )
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] | None = Field(
        None, description="How much transformers logs."
    )
    packing: bool | None = Field(
        None, description="Lay rows end to end in place of padding them; by default wherever the model can."
    )
    pack_length: PositiveInt | None = Field(
        None, description="Tokens computed at one time when rows are packed; by default 1024 on a CPU, on a GPU the"
        " longest row times per_device_train_batch_size. No change to what is learnt."
    )  # fmt: skip
    fused_layers: bool = Field(
        True, description="Norms and MLPs with fewer passes over memory, where they give the same."
    )
    recompute_layers: NonNegativeInt | Literal["auto"] | None = Field(
        None, description="Layers whose activations are computed again in the backward pass, counted from the first;"
        " auto: as few as the free memory asks for, which is the default where rows are packed in a Llama-like model."
        " gradient_checkpointing does so for all.",
    )  # fmt: skip
    stream_weights: bool = Field(
        False, description="Leave the base's frozen weights in their files and read them layer by layer, to a GPU too:"
        " slower, in the memory of a few layers.",
    )  # fmt: skip
    offload_activations: Literal["ram", "disk"] | None = Field(
        None, description="Where activations wait for the backward pass: ram (GPU), or disk, in the output folder:"
        " slower, the same numbers.",
    )  # fmt: skip
    memory_check: bool = Field(
        True, description="Refuse a run that the free memory does not hold, before the weights load; false lets it try."
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        "random", description="Order of the rows in an epoch."
    )

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        return argument_problems(data)

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
        if self.recompute_layers:
            arguments["gradient_checkpointing"] = True
        arguments["eval_strategy"] = self.eval_strategy_in_force(evaluates)
        arguments["save_strategy"] = self.save_strategy_in_force(evaluates)
        if self.save_steps is None and arguments["save_strategy"] == "steps" and self.eval_steps is not None:
            arguments["save_steps"] = self.eval_steps
        if not evaluates:
            for name in ("eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model"):
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
        """Whether the best model is kept, not the last: where something is evaluated, as said, else if any is saved."""
        if self.eval_strategy_in_force(evaluates) == "no":
            return False
        said = self.load_best_model_at_end
        return said if said is not None else self.save_strategy_in_force(evaluates) != "no"

    def likely_device(self, known: str | None = None) -> str:
        """The device of the run, "cuda", "mps" or "cpu": as `use_cpu` says, or what is known, or what shows without
        importing torch."""
        return "cpu" if getattr(self, "use_cpu", False) else known or plan_device()

    def layers_to_recompute(self) -> int | None:
        """What `recompute_layers` says, once planning has settled it; None leaves it to the other keys."""
        return self.recompute_layers if isinstance(self.recompute_layers, int) else None

    def checkpoints_activations(self) -> bool:
        """Whether activations are computed again rather than kept, under either of transformers' names for it."""
        return bool(self.recompute_layers) or any(
            getattr(self, f"{name}_checkpointing", None) for name in ("gradient", "activation")
        )

    def warmup_in_force(self, steps: int) -> int:
        """Steps of `steps` that warm up, by transformers' rule."""
        said = self.warmup_ratio if self.warmup_ratio is not None else self.warmup_steps or 0
        return int(said) if said >= 1 else math.ceil(steps * said)
