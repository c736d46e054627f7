"""The training arguments in transformers' form, and whether the libraries take them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hyperion_core.errors import TrainingError
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from ..refused_arguments import MUON
from .early_stopping import evaluation_key
from .muon import Muon
from .random_state import untouched_generators
from .sampler import EpochSampler

# What the engine decides, whatever is asked: it writes its own progress, keeps its own columns, and stops on NaN.
_FIXED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "average_tokens_across_devices": False,
}
# Names that the field knows, and that transformers 5 warns of.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_OWN_GROUPS = ("lomo", "galore", "apollo")
# What transformers, accelerate and torch raise for an argument that they refuse.
_REFUSALS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


class Arguments(TrainingArguments):
    """With an optimizer that transformers does not know."""

    muon = False


def training_arguments(arguments: Mapping[str, Any]) -> TrainingArguments:
    """transformers' arguments, for one device, with what the engine decides itself.

    Its refusals come as it raises them: `check_arguments` explains them.

    Raises:
        TrainingError: fp16 is asked for where it does not work.
    """
    wanted = {"report_to": "none", **arguments, **_FIXED}
    # transformers wants save_steps to be a multiple of eval_steps for this one; the engine saves every new best model
    keep_best = bool(wanted.pop("load_best_model_at_end", False))
    for old, new in _RENAMED.items():
        if old in wanted:
            wanted[new] = wanted.pop(old)
    muon = wanted.get("optim") == MUON
    args = Arguments(**{key: value for key, value in wanted.items() if not (muon and key == "optim")})
    args.muon = muon
    if args.fp16 and args.device.type != "cuda":
        raise TrainingError(
            f"training.fp16 does not work on {args.device}",
            why="float16 is computed on CUDA GPUs only; here the option would do nothing",
            fix="set training.bf16: true instead, or leave it out",
        )
    args.load_best_model_at_end = keep_best
    if args.eval_strategy != "no":
        args.metric_for_best_model = evaluation_key(args.metric_for_best_model or "loss")
        if args.greater_is_better is None:
            args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    if args.device.type != "cuda":
        args.dataloader_pin_memory = False  # there is no GPU to copy to, and torch warns of it
    args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would make transformers wrap the model in DataParallel
    return args


def optimizer_class(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class that `optim` names, and its options beside parameters, learning rate and decay.

    Raises:
        TrainingError: it wants parameter groups of its own.
    """
    if isinstance(args, Arguments) and args.muon:
        return Muon, {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    own_groups = any(name in args.optim for name in _OWN_GROUPS)
    found, options = (None, {}) if own_groups else Trainer.get_optimizer_cls_and_kwargs(args, None)
    if not isinstance(found, type):
        raise TrainingError(
            f'training.optim: "{args.optim.value}" cannot train an adapter',
            why="it makes parameter groups of its own, and the adapter's carry its learning rates and decay",
            fix="choose another, adamw_torch for one",
        )
    return found, options


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Set a run up with these arguments (output_dir may be missing) on a model of one weight, and throw it away.

    It writes nothing that stays, and draws no random number. Trackers (`report_to`) are not started.

    Raises:
        TrainingError: a library refuses them; names the option, where leaving one out helps.
    """
    with TemporaryDirectory() as folder, untouched_generators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will warn

        def attempt(given: Mapping[str, Any]) -> Exception | None:
            try:
                _set_up(training_arguments({**given, "report_to": "none", "output_dir": folder}))
            except (*_REFUSALS, TrainingError) as error:
                return error
            return None

        error = attempt(arguments)
        if isinstance(error, TrainingError):
            raise error
        if error is not None:
            raise _refusal(arguments, error, attempt) from error


def _set_up(args: TrainingArguments) -> None:
    """What a run does before its first step, as far as the arguments decide it."""
    model = torch.nn.Linear(1, 1, bias=False)
    rows = [{"input_ids": [0]}]  # transformers' own sampler, which ours stands in for, looks at their lengths
    trainer = Trainer(model, args, data_collator=list, train_dataset=rows, eval_dataset=rows)
    trainer.get_train_dataloader()
    strategy = str(args.train_sampling_strategy)
    seed = args.seed if args.data_seed is None else args.data_seed
    list(EpochSampler(1, seed=seed, strategy=strategy, lengths=[1]))
    chosen, options = optimizer_class(args)
    chosen([{"params": list(model.parameters()), "weight_decay": args.weight_decay}], **options)
    if args.activation_checkpointing:
        kwargs = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
        for name in ("every_n_layers", "offload"):  # transformers' own
            kwargs.pop(name, None)
        checkpoint(model, next(model.parameters()), **kwargs)


def _refusal(
    arguments: Mapping[str, Any], error: Exception, attempt: Callable[[Mapping[str, Any]], Exception | None]
) -> TrainingError:
    """An option is to blame if the run can be set up without it, or at least fails for another reason."""
    found = {
        name: attempt({key: value for key, value in arguments.items() if key != name})
        for name in arguments
        if name != "output_dir"
    }
    cured = [name for name, left in found.items() if left is None]
    blamed = cured or [name for name, left in found.items() if str(left) != str(error)]
    named = " and ".join(f"training.{name} ({arguments[name]!r})" for name in blamed)
    missing = "install what it lacks, or " if isinstance(error, ImportError) else ""
    return TrainingError(
        f"{named or 'the training arguments'}: refused",
        why=f"{type(error).__name__}: {error}",
        fix=missing + ("change it or leave it out" if named else "change them under training:"),
    )
