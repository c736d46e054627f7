"""From a config to a plan: what `hyperion validate` prints. Imports no torch, reads metadata and headers only."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import dataclass, replace

from hyperion_core.errors import CompatibilityError, DataError, HyperionError, ModelError, Problem
from hyperion_core.facts import BitPlan, Cost, Horizon, ModelFacts, Workload
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Quantizer
from hyperion_core.plan import Check, Choice, Plan

from .config import FinetuneConfig
from .data.arguments import DataArgumentsError
from .data.chat_template import chat_template_effect, chat_template_problems
from .data.processor import DatasetProcessor
from .memory import adapter_cost, forecast, planned_step, with_new_rows
from .models.check import check_base
from .models.facts import model_facts
from .models.hardware import choose_dtype, visible_gpus
from .models.source import BaseModelSource, resolve_source
from .optimization.recomputing_choice import with_recomputing
from .planning_hooks import PlanningHooks
from .quantization.planning import PlannedBits, described, planned_bits, quantized_cost
from .secret_checks import secret_problems
from .settling import check_adapter, quantizer_name, settle
from .training_checks import (
    batch_problems,
    device_problems,
    evaluation_problems,
    layer_problems,
    length_problems,
    streaming_problems,
    warmup_problems,
)

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")
_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to train and to evaluate on; None is not known yet."""

    train: int | None
    evaluation: int | None

    @property
    def evaluates(self) -> bool:
        return self.evaluation is None or self.evaluation > 0


@dataclass(frozen=True)
class Planned:
    """A plan, and what was found on the way to it that the run needs again.

    `config` is what was `asked` for, with what a quantized base brings along and `quality: auto` fills in; `bits` are
    those of its modules, None where nothing is quantized or they are shared out later.
    """

    plan: Plan
    asked: FinetuneConfig
    config: FinetuneConfig
    hooks: RunHooks
    source: BaseModelSource
    facts: ModelFacts
    processor: DatasetProcessor | None
    bits: BitPlan | None


def make_plan(
    config: FinetuneConfig,
    *,
    rows: Rows | None = None,
    evaluation_rows: int | None = None,
    device: str | None = None,
) -> Planned:
    """Settle every choice of a run and look for everything that could stop it.

    Args:
        config: what is asked for.
        rows: how many rows there are, where the caller already holds the datasets; else the config's are counted.
        evaluation_rows: how many rows the caller holds to evaluate on, in place of the config's.
        device: what the run will use, where that is known; else it is guessed. `use_cpu` overrules both.

    Raises:
        ConfigError: with every problem at once.
    """
    problems = secret_problems(config.as_data())
    given, training = config, config.training
    source, facts = _base_model(config, problems)
    settled = settle(config, source, facts, problems)
    config, asked = settled.config, PlanningHooks(settled.hooks)
    processor = _processor(config, problems)
    rows = rows or _counted(config, processor, problems)
    if evaluation_rows is not None:
        rows = replace(rows, evaluation=evaluation_rows)
    device = training.likely_device(device)
    dtype = choose_dtype(config.dtype, device)
    steps, why_no_steps = optimizer_steps(config, rows)
    check_adapter(config, asked, facts, problems)
    bits = planned_bits(config.quantization, config.base_dir, asked, facts, settled.saved, device, dtype, problems)
    found = asked.objective(config.objective.type).objective_check(config=config.objective)
    problems += [problem.at("objective") for problem in found or []]
    _check_training(config, facts, rows, device, dtype, steps, problems)
    _check_scheduler(config, asked, steps, problems)
    config.refuse(problems)
    assert source is not None

    targets = _adapter_targets(config, asked, facts)

    def memory_of(tried: FinetuneConfig) -> tuple[dict[str, int], int | None]:
        return _memory(tried, asked, facts, bits, dtype, device, targets or [])

    config, recomputed = with_recomputing(config, facts.layers, device, lambda tried: memory_of(tried)[0])
    memory, trainable = memory_of(config)
    plan = Plan(
        config=config.as_data(),
        choices=tuple(settled.choices),
        device=device,
        dtype=dtype,
        settings=_settings(config, settled.preset, recomputed, facts, targets, rows, bits),
        checks=tuple(_checks(config, asked, facts, bits)),
        steps=steps,
        why_no_steps=why_no_steps,
        memory=memory,
        why_no_memory=facts.why_unknown,
        trainable=trainable,
        versions=versions(settled.choices),
    )
    return Planned(plan, given, config, settled.hooks, source, facts, processor, bits.known if bits else None)


def effective_max_length(config: FinetuneConfig, facts: ModelFacts) -> int:
    """Tokens of a row that are kept: what was asked for, or its default within the model's context."""
    return config.training.max_length or min(_MAX_LENGTH, facts.context_length or _MAX_LENGTH)


def count_rows(config: FinetuneConfig, processor: DatasetProcessor | None) -> Rows:
    """Rows after sample_limit and validation_split, as far as they can be counted cheaply."""
    if processor is None or config.dataset is None:
        return Rows(None, None)
    sizes = processor.split_sizes()
    return Rows(*sizes) if sizes else Rows(None, None if config.dataset.validation_split else 0)


def optimizer_steps(config: FinetuneConfig, rows: Rows) -> tuple[int | None, str]:
    """Optimizer steps of the run, or None and why."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps, ""
    if rows.train is None:
        return None, "the data is counted when it is loaded"
    full, rest = divmod(rows.train, training.per_device_train_batch_size)
    batches = full + bool(rest and not getattr(training, "dataloader_drop_last", None))
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return math.ceil(per_epoch * training.num_train_epochs), ""


def versions(choices: list[Choice]) -> dict[str, str]:
    """Version of every plugin and library of a run, and of Python."""
    found = {choice.distribution: choice.version for choice in choices}
    for name in ("hyperion-core", "hyperion-ft", *_LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def _base_model(config: FinetuneConfig, problems: list[Problem]) -> tuple[BaseModelSource | None, ModelFacts]:
    try:
        source = resolve_source(config.base_model, config.revision, config.base_dir)
        facts = model_facts(source)
        check_base(source, facts, trust_remote_code=config.trust_remote_code)
        return source, facts
    except ModelError as error:
        problems.append(_problem("base_model", error))
        return None, ModelFacts(config.base_model, why_unknown="the base model cannot be read")


def _processor(config: FinetuneConfig, problems: list[Problem]) -> DatasetProcessor | None:
    if config.dataset is None:
        return None
    try:
        given = {key: value for key, value in config.dataset.given().items() if key != "chat_template"}
        problems += chat_template_problems(config.dataset.chat_template, config.base_dir)
        processor = DatasetProcessor(**given, base_dir=config.base_dir)
        processor.check_first_rows()  # and columns that no format has, and templates without effect
        if config.dataset.chat_template is not None:
            problems += chat_template_effect(processor.detected_format())
        return processor
    except DataArgumentsError as error:
        problems += [problem.at("dataset") for problem in error.problems]
    except DataError as error:
        problems.append(_problem("dataset", error))
    return None


def _counted(config: FinetuneConfig, processor: DatasetProcessor | None, problems: list[Problem]) -> Rows:
    try:
        return count_rows(config, processor)
    except DataError as error:
        problems.append(_problem("dataset", error))
        return Rows(None, None)


def _check_training(
    config: FinetuneConfig, facts: ModelFacts, rows: Rows, device: str, dtype: str, steps: int | None,
    problems: list[Problem],
) -> None:  # fmt: skip
    training = config.training
    found = (
        length_problems(training, facts)
        + layer_problems(training, facts)
        + streaming_problems(training, facts, config.quantization, device, dtype)
        + device_problems(training, device)
        + warmup_problems(training, steps)
    )
    found += batch_problems(training, rows.train, rows.evaluation)
    if not rows.evaluates:
        found += evaluation_problems(training)
    problems += [problem.at("training") for problem in found]


def _check_scheduler(config: FinetuneConfig, hooks: PlanningHooks, steps: int | None, problems: list[Problem]) -> None:
    if steps is None:
        return
    training, scheduler = config.training, config.scheduler()
    found = hooks.scheduler(scheduler.type).scheduler_check(
        config=scheduler,
        horizon=Horizon(steps, training.warmup_in_force(steps)),
        learning_rate=training.learning_rate,
    )
    where = "lr_scheduler_type" if training.lr_scheduler_type else "lr_scheduler"
    problems += [problem.at(f"training.{where}") for problem in found or []]


def _adapter_targets(config: FinetuneConfig, hooks: PlanningHooks, facts: ModelFacts) -> list[str] | None:
    if not facts.known:
        return None
    try:
        return hooks.adapter(config.adapter.type).adapter_targets(config=config.adapter, model=facts)
    except CompatibilityError as error:
        config.refuse([_problem("adapter", error)])
        raise


def _memory(
    config: FinetuneConfig,
    hooks: PlanningHooks,
    facts: ModelFacts,
    bits: PlannedBits | None,
    dtype: str,
    device: str,
    targets: list[str],
) -> tuple[dict[str, int], int | None]:
    if not facts.known:
        return {}, None
    training = config.training
    step = planned_step(training, facts, effective_max_length(config, facts), dtype, device)
    driver, learning = hooks.adapter(config.adapter.type), with_new_rows(config, facts, targets)

    def estimate(work: Workload) -> Cost:
        return driver.adapter_estimate(config=config.adapter, model=facts, work=work)

    adapter = adapter_cost(estimate, config, facts, step, learning)
    quantizer: Cost | None = None
    if config.quantization is not None and bits is not None:
        quantizer = quantized_cost(config.quantization, hooks, facts, bits, dtype)
    memory = forecast(facts, adapter, quantizer, step, training.optim, learning, streams=training.stream_weights)
    return memory, adapter.memory.get("adapter", 0) // 4


def _settings(
    config: FinetuneConfig,
    preset: str,
    recomputed: str,
    facts: ModelFacts,
    targets: list[str] | None,
    rows: Rows,
    bits: PlannedBits | None,
) -> dict[str, str]:
    training = config.training
    settings = {"base model": config.base_model + (f" ({facts.parameters:,} parameters)" if facts.known else "")}
    if preset:
        settings["quality"] = preset
    if config.quantization is not None and bits is not None:
        settings["quantization"] = described(config.quantization, bits)
    if targets is not None:
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in targets))
        settings["adapter on"] = f"{len(targets)} modules: {names}"
    settings["data"] = _data_line(config, rows)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if recomputed:
        settings["recompute_layers"] = recomputed
    settings["batch"] = (
        f"{batch} rows a step ({training.per_device_train_batch_size} × {training.gradient_accumulation_steps})"
        f", at most {effective_max_length(config, facts)} tokens a row"
    )
    for name, kind in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(training, name, None):
            settings["autocast"] = kind
    settings["learning rate"] = f"{training.learning_rate:g}"
    settings["gradient clipping"] = f"norm {training.max_grad_norm:g}" if training.max_grad_norm else "none"
    settings["evaluation"] = training.eval_strategy_in_force(rows.evaluates)
    if training.keeps_best(rows.evaluates):
        settings["kept"] = f"the best by {training.metric_for_best_model}"
    if config.new_tokens:
        settings["new tokens"] = str(len(config.new_tokens))
    if config.trust_remote_code:
        settings["trust_remote_code"] = "ON: Python code that comes with the model will run"
    return settings


def _data_line(config: FinetuneConfig, rows: Rows) -> str:
    name = config.dataset.dataset if config.dataset else "given in Python"
    if rows.train is None:
        return name
    return f"{name} ({rows.train} rows" + (f" + {rows.evaluation} to evaluate on)" if rows.evaluation else ")")


def _checks(config: FinetuneConfig, hooks: PlanningHooks, facts: ModelFacts, bits: PlannedBits | None) -> list[Check]:
    found = []
    if config.quantization is not None:
        name = quantizer_name(config)
        plugin = hooks.plugin("quantizer", name)
        if isinstance(plugin, Quantizer) and config.adapter.type not in plugin.trained_under:
            why = "their capabilities fit, but no test of the quantizer's runs the pair"
            found.append(Check(f"{config.adapter.type} on {name}", "untested", why))
        if bits is not None and bits.made_for not in ("", name):
            why = f"its bits were shared out for {bits.made_for}, which does not round as {name} does"
            found.append(Check(str(config.quantization.bit_plan), "note", why))
    if not facts.known:
        found.append(Check("adapter targets", "unknown", f"{facts.why_unknown}; they are checked when it is loaded"))
    if visible_gpus() > 1:
        found.append(Check(f"{visible_gpus()} GPUs", "note", "the first one is used; this version runs on one device"))
    return found


def _problem(path: str, error: HyperionError) -> Problem:
    return Problem(path, error.what, error.why, error.fix)
