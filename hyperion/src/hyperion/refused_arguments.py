"""What `training:` refuses: fields of transformers' arguments that would do nothing or harm, and keys that contradict.

Everything here is decided from the keys alone; what depends on model, data or device is `training_checks`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from hyperion_core.errors import Problem
from hyperion_core.foreign import foreign_keys, foreign_values
from hyperion_core.suggest import did_you_mean

_ELSEWHERE = "it is said elsewhere"
_REPLACED = "the engine does this its own way, so the field would do nothing"
_LATER = "this version runs one process on one device"
_OBJECTIVES = "what is learnt from the labels is the objective's business"
_INEXACT = "it would break exact resume"
_COMPILED = "the layers are fused already: compiling them took longer than it saved where it was measured"

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
    "label_smoothing_factor": (_OBJECTIVES, "write objective: {type: sft, label_smoothing: 0.1}"),
    "greater_is_better": ("the best model is judged by the loss, and a loss is better when lower", "leave it out"),
    "logging_nan_inf_filter": ("a loss that is not finite stops the run and says where", "leave it out"),
    "disable_tqdm": (_REPLACED, "leave it out: progress becomes plain lines when stderr is no terminal"),
    "use_liger_kernel": ("it patches transformers for the whole process", "leave it out"),
    "liger_kernel_config": ("it patches transformers for the whole process", "leave it out"),
    "torch_compile": (_COMPILED, "leave it out"),
    "torch_compile_backend": (_COMPILED, "leave it out"),
    "torch_compile_mode": (_COMPILED, "leave it out"),
    "ignore_data_skip": (_INEXACT, "leave it out"),
    "dataloader_in_order": (_INEXACT, "leave it out"),
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

_OWN_GROUPS = ("galore", "apollo", "lomo")
# What an optimizer's name says of the module that has it, and what to install; the first that fits counts.
_OPTIMIZER_NEEDS: tuple[tuple[str, str, str], ...] = (
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    (r"adamw_torch_xla", "torch_xla", "torch_xla"),
    (r"adamw_torch_npu_fused", "torch_npu", "torch_npu"),
    (r"adamw_anyprecision", "torchdistx", "torchdistx"),
    (r"ademamix|paged_.*|rmsprop_bnb|.*_(8|32)bit", "bitsandbytes", '"hyperion-ft[bnb]"'),
    (r"grokadamw", "grokadamw", "grokadamw"),
    (r"schedule_free_.*", "schedulefree", "schedulefree"),
    (r"stable_adamw", "optimi", "torch-optimi"),
)
_NEED_WORKERS = (
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
)
#: An optimizer of Hyperion's own: engine/muon.py.
MUON = "muon"
_TRACKIOS_OWN = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
# The Hub's own rule for names of repositories.
_HUB_ID = re.compile(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def argument_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with the keys of `training:`, as the user gave them."""
    found = [Problem(key, f'"{key}" is not taken', why, fix) for key, (why, fix) in REFUSED.items() if key in data]
    for one, other in (
        ("warmup_ratio", "warmup_steps"),
        ("lr_scheduler", "lr_scheduler_type"),
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing", "recompute_layers"),
        ("activation_checkpointing", "recompute_layers"),
    ):
        if data.get(one) is not None and data.get(other) is not None:
            found.append(_together(one, other, "they say the same thing twice"))
    if data.get("bf16") and data.get("fp16"):
        found.append(_together("bf16", "fp16", "autocast has one type"))
    if data.get("max_steps") == 0:
        found.append(
            Problem("max_steps", "0 steps train nothing", "a run has at least one step", "give a number above 0, or -1")
        )
    if isinstance(data.get("lr_scheduler"), Mapping) and data.get("lr_scheduler_kwargs"):
        what = "the scheduler's options stand in two places"
        why = "only one of them could count"
        found.append(Problem("lr_scheduler_kwargs", what, why, "put them in lr_scheduler"))
    found += _optimizer_problems(data.get("optim"))
    found += _tracker_problems(data)
    found += _interval_contradictions(data)
    found += _dead_options(data)
    found += _hub_problems(data.get("hub_model_id"))
    return found


def _together(one: str, other: str, why: str) -> Problem:
    return Problem(one, f'"{one}" and "{other}" stand together', why, "keep one of them")


def _optimizer_problems(name: Any) -> list[Problem]:
    known = [*foreign_values("transformers", "training_args.py", "OptimizerNames"), MUON]
    if not isinstance(name, str):
        return []
    if name not in known:
        why = "the installed transformers has none of that name"
        return [Problem("optim", f'no optimizer is called "{name}"', why, did_you_mean(name, known))]
    if any(family in name for family in _OWN_GROUPS):
        why = "it makes parameter groups of its own, and the adapter's carry its learning rates and decay"
        return [Problem("optim", f'"{name}" cannot train an adapter', why, "choose another, adamw_torch for one")]
    for pattern, module, to_install in _OPTIMIZER_NEEDS:
        if re.fullmatch(pattern, name):
            if importlib.util.find_spec(module) is None:
                fix = f"python -m pip install {to_install}, or choose another optimizer"
                why = f"no module {module} is found in this Python environment"
                return [Problem("optim", f'"{name}" needs {module}', why, fix)]
            break
    return []


def tracker_fix(name: str) -> str:
    """What to do with a tracker that stands where an observer should; "" for what is no tracker."""
    known = foreign_keys("transformers", "integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    return f"{name} is a tracker: write training: {{report_to: {name}}}" if name in known else ""


def _tracker_problems(data: Mapping[str, Any]) -> list[Problem]:
    """transformers would find out only when the model is loaded."""
    known = foreign_keys("transformers", "integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    report_to = data.get("report_to")
    named = [report_to] if isinstance(report_to, str) else report_to if isinstance(report_to, list) else []
    trackers = [name for name in named if isinstance(name, str) and name != "none"]
    found = []
    for name in trackers:
        module = {"azure_ml": "azureml"}.get(name, name)
        if name == "all":
            continue
        if name not in known:
            why = "the installed transformers has none of that name"
            found.append(Problem("report_to", f'no tracker is called "{name}"', why, did_you_mean(name, known)))
        elif importlib.util.find_spec(module) is None:
            fix = f"python -m pip install {module}"
            why = f"no module {module} is found in this Python environment"
            found.append(Problem("report_to", f'the tracker "{name}" is not installed', why, fix))
    if data.get("run_name") is not None and not trackers:
        why = "run_name is for trackers, and report_to names none"
        found.append(Problem("run_name", "run_name does nothing", why, "set report_to, or leave it out"))
    if not {"trackio", "all"} & set(trackers):
        found += [
            Problem(key, f"{key} does nothing", "it is for Trackio, and report_to does not name it",
                    "leave it out, or add trackio to report_to")
            for key in _TRACKIOS_OWN
            if data.get(key) is not None
        ]  # fmt: skip
    return found


def _interval_contradictions(data: Mapping[str, Any]) -> list[Problem]:
    found = []
    for steps, strategy, others in (
        ("eval_steps", "eval_strategy", ("no", "epoch")),
        ("save_steps", "save_strategy", ("no", "epoch", "best")),
        ("logging_steps", "logging_strategy", ("no", "epoch")),
    ):
        chosen = data.get(strategy)
        if data.get(steps) and isinstance(chosen, str) and chosen in others:
            what = f'{steps} stands beside {strategy} "{chosen}"'
            found.append(Problem(steps, what, "the steps would never be used", "remove one of them"))
    if data.get("eval_strategy") != "no":
        return found
    for key, why in (
        ("early_stopping_patience", "nothing is evaluated, so nothing can stop early"),
        ("eval_delay", "nothing is evaluated, so there is nothing to delay"),
        ("load_best_model_at_end", "nothing is evaluated, so no model is the best"),
    ):
        if data.get(key):
            found.append(Problem(key, f"{key} does nothing", why, "remove eval_strategy: no"))
    if data.get("save_strategy") == "best":
        why = "nothing is evaluated, so no model is the best"
        found.append(Problem("save_strategy", '"best" would save nothing', why, "choose another"))
    return found


def _dead_options(data: Mapping[str, Any]) -> list[Problem]:
    """Options of something that is switched off."""
    found = []
    if not data.get("dataloader_num_workers"):
        found += [
            Problem(key, f"{key} does nothing", "it is for worker processes, and there are none",
                    "set dataloader_num_workers, or leave it out")
            for key in _NEED_WORKERS
            if data.get(key)
        ]  # fmt: skip
    if data.get("optim") == MUON and data.get("optim_args"):
        why, fix = "muon takes none", "leave it out; its momentum is adam_beta1"
        found.append(Problem("optim_args", "optim_args does nothing", why, fix))
    if data.get("packing") is False and data.get("pack_length") is not None:
        why, fix = "rows are padded, so there are no packs", "leave one of the two out"
        found.append(Problem("pack_length", "pack_length does nothing", why, fix))
    if not any(data.get(key) for key in ("gradient_checkpointing", "activation_checkpointing", "recompute_layers")):
        found += [
            Problem(key, f"{key} stands alone", "checkpointing is off", f"set {key.removesuffix('_kwargs')}: true")
            for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
            if data.get(key) is not None
        ]
    return found


def _hub_problems(name: Any) -> list[Problem]:
    if not isinstance(name, str):
        return []
    if _HUB_ID.fullmatch(name) and "--" not in name and ".." not in name and not name.endswith(".git"):
        return []
    why = 'the Hub takes letters, digits, "-", "_" and ".", up to 96 of them, neither first nor last a "-" or "."'
    return [Problem("hub_model_id", f"{name!r} is no name of a repository", why, "hub_model_id: owner/name")]
