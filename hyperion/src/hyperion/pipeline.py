"""One run, read from top to bottom: a config goes in, an artifact comes out.

Whatever a method can be is asked of the run's plugins through `planned.hooks`; nothing here knows one by name.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import Artifact
from hyperion_core.config import AdapterConfig
from hyperion_core.context import NoProgress, Progress, RunContext
from hyperion_core.errors import DataError
from hyperion_core.quiet import ON_IMPORT, errors_only
from hyperion_core.secrets import hide_in_logs

from .auditing import audit_encoded
from .config import FinetuneConfig
from .data.chat_template import read_chat_template
from .data.identity import cache_identity, data_hashes
from .data.row_hook import RowHook
from .disk import writing
from .lock import LOCK, gather, gather_for, read_lock, refuse_drift, run_name, write_lock
from .models.cache import check_caches
from .models.facts import model_facts
from .models.source import resolve_source
from .optimization.refusal import refuse_what_cannot_fit, within_memory
from .output import (
    check_same_data,
    claim_output,
    output_folder,
    read_prepared,
    write_artifact,
    write_plan,
    write_prepared,
)
from .planning import Planned, Rows, effective_max_length, make_plan
from .settling import quantizer_name
from .training_checks import length_problems

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from .data.audit.findings import AuditReport
    from .data.tokenization import TokenReport
    from .engine.fit import FitResult
    from .quantization.calibration import CalibrationRows

#: The one adapter of a run has this name inside the model; PEFT's tools expect it.
ADAPTER_NAME = "default"


@dataclass(frozen=True)
class Encoded:
    """Prepared rows, and the tokens of each of them as `tokenize_rows` gives them: (rows, tokens)."""

    train: tuple[Dataset, Dataset]
    evaluation: tuple[Dataset, Dataset] | None
    max_length: int
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """Tokenized data: columns input_ids, labels, length."""

    train: Dataset
    evaluation: Dataset | None
    report: TokenReport
    provenance: dict[str, Any]
    audit: AuditReport


def run(
    config: FinetuneConfig,
    *,
    output_dir: str | Path,
    train: Dataset | None = None,
    evaluation: Dataset | None = None,
    resume: bool = False,
    lock: Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Plan, train, and leave an artifact in `output_dir`.

    Args:
        config: what to do.
        output_dir: a folder that does not exist yet, or, with `resume`, the one of an interrupted run.
        train, evaluation: rows of `DatasetProcessor.prepare()`; without `train`, the config's dataset is prepared.
        resume: go on from the last complete checkpoint.
        lock: a lock file that the run must agree with.

    Raises:
        HyperionError: the run cannot start or go on; says what, whose, why, and the fix.
    """
    if train is None and config.dataset is None:
        raise DataError("there is no data", why="neither the config nor the call gives any",
                        fix="set dataset: in the config, or pass train_dataset")  # fmt: skip
    with output_folder(Path(output_dir), resume=resume) as (folder, checkpoint):
        check_caches()
        planned = plan_run(config, train, evaluation)
        config = planned.config
        if lock is not None:
            refuse_drift(lock, read_lock(lock, run_name(config)), gather_for(planned, progress or NoProgress()))
        refuse_what_cannot_fit(planned)
        claim_output(folder, planned.plan, checkpoint)
        ctx = start_context(planned, folder, progress or NoProgress())
        planned.hooks.observe("run_start", plan=planned.plan, ctx=ctx)
        try:
            base = obtain_base(planned, config, ctx)
            tokenizer, new_ids = load_tokenizer(base, config)
            encoded = encode_data(base, planned, config, tokenizer, ctx, train, evaluation)
            report = audit_encoded(encoded, base, planned, config, tokenizer, ctx.progress)
            tokens = prepare_data(encoded, report, tokenizer, ctx)
            planned = within_memory(planned, base, tokens.train, ctx.log)
            config, ctx = planned.config, replace(ctx, plan=planned.plan)
            write_plan(folder, planned.plan)
            calibration = calibrate_on(base, tokens, planned, config, tokenizer, ctx)
            check_same_data(folder, all_hashes(tokens, calibration), resume=resume)
            write_lock(folder / LOCK, run_name(config), gather(planned, tokens.provenance, ctx.progress, base))
            model = load_base(base, planned, config, tokenizer, new_ids, calibration, ctx)
            ctx = replace(ctx, new_token_ids=tuple(new_ids))
            model, adapter = attach_adapter(model, planned, config, tokenizer, tokens, checkpoint, ctx)
            fitted = fit(model, tokenizer, tokens, planned, config, adapter, checkpoint, ctx)
            artifact = leave_artifact(fitted, tokenizer, tokens, planned, config, adapter, calibration, ctx)
            publish(artifact, config, ctx)
        except BaseException as error:
            planned.hooks.observe("run_error", error=error, ctx=ctx)
            raise
        planned.hooks.observe("run_end", artifact=artifact, ctx=ctx)
    return artifact


def plan_run(config: FinetuneConfig, train: Dataset | None, evaluation: Dataset | None) -> Planned:
    """The plan, made again on the device that torch really finds, with the training arguments checked."""
    with errors_only(*ON_IMPORT):
        from .engine.fit import check_arguments
    from .models.hardware import actual_device

    held_out = len(evaluation) if evaluation is not None else None
    rows = None if train is None else Rows(len(train), held_out or 0)
    device = "cpu" if getattr(config.training, "use_cpu", False) else actual_device()
    planned = make_plan(config, rows=rows, evaluation_rows=held_out, device=device)
    splits = train is None and config.dataset is not None and config.dataset.validation_split > 0
    check_arguments(training_arguments(config, device, evaluates=splits or bool(held_out)))
    return planned


def training_arguments(config: FinetuneConfig, device: str, *, evaluates: bool) -> dict[str, Any]:
    """Keyword arguments for `transformers.TrainingArguments`, without output_dir."""
    arguments = config.training.arguments(evaluates=evaluates)
    # transformers takes some options (bf16) on a CPU only where the CPU was asked for; here it was found.
    return {**arguments, "use_cpu": True} if device == "cpu" else arguments


def start_context(planned: Planned, folder: Path, progress: Progress) -> RunContext:
    """What every plugin is told about this run; seeds every generator."""
    from transformers import set_seed

    from .models.cache import cache_dir

    hide_in_logs(logging.getLogger("hyperion"))  # again: the plugins, loaded by now, may have loggers below it
    seed = planned.plan.config["training"]["seed"]
    set_seed(seed)
    return RunContext(
        plan=planned.plan,
        seed=seed,
        device=planned.plan.device,
        output=folder,
        cache=cache_dir(),
        progress=progress,
    )


def obtain_base(planned: Planned, config: FinetuneConfig, ctx: RunContext) -> Path:
    """The base model as a local folder in transformers' format: downloaded or converted where it must be."""
    from .models.load import materialize

    return materialize(
        planned.source,
        ctx.cache,
        ctx.log.info,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def load_tokenizer(base: Path, config: FinetuneConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer, with the config's chat template and the run's new tokens in it, and their ids."""
    from .models.load import load_tokenizer as load
    from .models.new_tokens import add_to_tokenizer

    tokenizer = load(base, trust_remote_code=config.trust_remote_code)
    given = config.dataset.chat_template if config.dataset else None
    if given is not None:
        tokenizer.chat_template = read_chat_template(given, config.base_dir)
    return tokenizer, add_to_tokenizer(tokenizer, config.new_tokens)


def encode_data(
    base: Path,
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    ctx: RunContext,
    train: Dataset | None,
    evaluation: Dataset | None,
) -> Encoded:
    """Rows to tokens and labels. The objective says what the model reads of a row."""
    from .data.tokenization import tokenize_rows

    provenance: dict[str, Any] = {"kind": "given in Python"}
    if train is None:
        assert planned.processor is not None
        train, split_off = planned.processor.prepare(progress=ctx.progress)
        evaluation = evaluation if evaluation is not None else split_off
        provenance = planned.processor.provenance()
    else:
        provenance["fingerprint"] = getattr(train, "_fingerprint", None)
    if evaluation is not None and not len(evaluation):
        evaluation = None
    facts = planned.facts if planned.facts.known else model_facts(resolve_source(str(base)))
    config.refuse([problem.at("training") for problem in length_problems(config.training, facts)])
    objective = planned.hooks.plugin("objective", config.objective.type)
    max_length = effective_max_length(config, facts)
    encoded = partial(
        tokenize_rows,
        tokenizer=tokenizer,
        sequences=RowHook(objective, config.objective),
        max_length=max_length,
        cache_dir=ctx.cache / "tokens",
        fingerprint_of=f"{cache_identity(objective)} {config.objective.model_dump_json()}",
        progress=ctx.progress,
    )
    read = (train, encoded(train))
    held_out = None if evaluation is None else (evaluation, encoded(evaluation))
    return Encoded(read, held_out, max_length, provenance)


def prepare_data(encoded: Encoded, audit: AuditReport, tokenizer: PreTrainedTokenizerBase, ctx: RunContext) -> Tokens:
    """What is trained and evaluated on: the rows that have something to learn.

    Raises:
        AuditError: the audit refuses the data.
    """
    from .data.tokenization import trainable

    for finding in audit.of("warned"):
        ctx.log.warning("audit warns: %s", finding)
    audit.refuse()
    ctx.log.info("%s", audit.summary())
    tokens, report = trainable(encoded.train[1], tokenizer, encoded.max_length)
    _tell("training data", report, ctx)
    held_out = None
    if encoded.evaluation is not None:
        held_out, evaluation_report = trainable(encoded.evaluation[1], tokenizer, encoded.max_length)
        _tell("evaluation data", evaluation_report, ctx)
    return Tokens(tokens, held_out, report, encoded.provenance, audit)


def _tell(what: str, report: TokenReport, ctx: RunContext) -> None:
    ctx.log.info(
        "%s: %d rows, %d tokens, %d of them learnt, longest row %d",
        what, report.rows, report.tokens, report.supervised, report.longest,
    )  # fmt: skip
    if report.truncated:
        ctx.log.warning(
            "%s: %d of %d rows were cut at max_length: their ends are not learnt", what, report.truncated, report.rows
        )
    for warning in report.warnings:
        ctx.log.warning("%s: %s", what, warning)


def calibrate_on(
    base: Path,
    tokens: Tokens,
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    ctx: RunContext,
) -> CalibrationRows | None:
    """What a quantizer measures on: rows of the training data, or those that the config names. None: nothing asks."""
    from .quantization.calibration import measured_rows

    if config.quantization is None:
        return None
    plugin = planned.hooks.plugin("quantizer", quantizer_name(config))
    return measured_rows(base, config.quantization, plugin, tokens.train, tokenizer, config.base_dir, ctx)


def all_hashes(tokens: Tokens, calibration: CalibrationRows | None) -> dict[str, str | None]:
    """Of everything that is learnt from, evaluated or measured on."""
    from .quantization.calibration import rows_hash

    hashes = data_hashes(tokens.train, tokens.evaluation)
    return {**hashes, "calibration": rows_hash(calibration)} if calibration else hashes


def load_base(
    base: Path,
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    new_ids: list[int],
    calibration: CalibrationRows | None,
    ctx: RunContext,
) -> Module:
    """The base's weights, quantized where the config says so, on the run's device, with rows for the new tokens."""
    from .models.new_tokens import grow_embeddings
    from .quantization.base import load_quantizable

    model = load_quantizable(
        base,
        config.quantization,
        planned.hooks,
        ctx,
        training=True,
        bits=planned.bits,
        calibration=calibration,
        mapped=config.training.stream_weights,
        trust_remote_code=config.trust_remote_code,
    )
    grow_embeddings(model, tokenizer, new_ids)
    return model


def attach_adapter(
    model: Module,
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    checkpoint: Path | None,
    ctx: RunContext,
) -> tuple[Module, AdapterConfig]:
    """A fresh adapter on the frozen base, or the checkpoint's; and the config that is in force.

    An adapter that initialises from data (`adapter_prepare`) may change its config; a resumed run finds it again.
    """
    from .engine.batches import training_batches

    adapter = planned.hooks.adapter(config.adapter.type)
    if checkpoint is not None:
        in_force = read_prepared(ctx.output, config.adapter)
        return adapter.adapter_load(
            model=model, name=ADAPTER_NAME, folder=checkpoint / "adapter", trainable=True, ctx=ctx
        ), in_force
    device = str(next(model.parameters()).device)  # the run's, or where weights wait that are to be streamed
    batches = training_batches(tokens.train, tokenizer, config.training.per_device_train_batch_size, device)
    prepared = adapter.adapter_prepare(config=config.adapter, model=model, batches=batches, ctx=ctx)
    in_force = write_prepared(ctx.output, prepared) if prepared is not None else config.adapter
    return adapter.adapter_apply(model=model, name=ADAPTER_NAME, config=in_force, ctx=ctx), in_force


def fit(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    planned: Planned,
    config: FinetuneConfig,
    adapter: AdapterConfig,
    checkpoint: Path | None,
    ctx: RunContext,
) -> FitResult:
    """The training loop."""
    from .engine.fit import Speed
    from .engine.fit import fit as train_loop

    training = config.training
    if checkpoint is not None:
        ctx.log.info("going on from %s", checkpoint.name)
    return train_loop(
        model,
        tokenizer,
        tokens.train,
        tokens.evaluation,
        arguments={
            "output_dir": str(ctx.output),
            **training_arguments(config, ctx.device, evaluates=tokens.evaluation is not None),
        },
        hooks=planned.hooks,
        ctx=ctx,
        adapter=(config.adapter.type, adapter),
        objective=(config.objective.type, config.objective),
        scheduler=(config.scheduler().type, config.scheduler()),
        early_stopping_patience=training.early_stopping_patience,
        eval_samples=training.eval_samples,
        eval_samples_max_new_tokens=training.eval_samples_max_new_tokens,
        speed=Speed(
            packing=training.packing,
            pack_length=training.pack_length,
            fused_layers=training.fused_layers,
            recompute_layers=training.layers_to_recompute(),
            stream_weights=training.stream_weights,
            offload_activations=training.offload_activations,
        ),
        resume=checkpoint,
    )


def leave_artifact(
    fitted: FitResult,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    planned: Planned,
    config: FinetuneConfig,
    adapter: AdapterConfig,
    calibration: CalibrationRows | None,
    ctx: RunContext,
) -> Artifact:
    """Adapter, tokenizer, plan, versions, hashes, metrics, and a model card that tells them."""
    from .monitoring.plot import draw_loss_curve
    from .quantization.calibration import rows_hash

    with writing("the artifact", ctx.output):
        planned.hooks.adapter(config.adapter.type).adapter_save(
            model=fitted.model, name=ADAPTER_NAME, config=adapter, folder=ctx.output, for_resume=False
        )
        tokenizer.save_pretrained(ctx.output)
        draw_loss_curve(ctx.output / "metrics.jsonl", ctx.output / "loss.png")
        return write_artifact(
            ctx.output,
            planned,
            config,
            adapter,
            metrics=fitted.metrics,
            calibration=rows_hash(calibration) if calibration else None,
            data={
                **tokens.provenance,
                "tokenized": asdict(tokens.report),
                "audit": tokens.audit.as_data(examples=False),
            },
        )


def publish(artifact: Artifact, config: FinetuneConfig, ctx: RunContext) -> None:
    """Upload the artifact, where the config asks for it."""
    if config.training.push_to_hub:
        from .deployment.hub import push

        name = config.training.hub_model_id or artifact.folder.resolve().name
        push(artifact, name, private=config.training.hub_private_repo, log=ctx.log.info)
