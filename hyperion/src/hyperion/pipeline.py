"""One run, read from top to bottom: a config goes in, an artifact comes out.

Whatever a method can be is asked of the run's plugins through `planned.hooks`; nothing here knows one by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import Artifact
from hyperion_core.context import NoProgress, Progress, RunContext
from hyperion_core.errors import DataError

from .config import FinetuneConfig
from .output import claim_output, write_artifact
from .planning import Planned, Rows, make_plan, quantizer_name, uniform_bits

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from .data.tokenization import TokenReport
    from .engine.fit import FitResult

#: The one adapter of a run has this name inside the model; PEFT's tools expect it.
ADAPTER_NAME = "default"


@dataclass(frozen=True)
class Tokens:
    """Tokenized data: columns input_ids, labels, length."""

    train: Dataset
    evaluation: Dataset | None
    report: TokenReport
    provenance: dict[str, Any]


def run(
    config: FinetuneConfig,
    *,
    output_dir: str | Path,
    train: Dataset | None = None,
    evaluation: Dataset | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Plan, train, and leave an artifact in `output_dir`.

    Args:
        config: what to do.
        output_dir: a folder that does not exist yet, or, with `resume`, the one of an interrupted run.
        train, evaluation: rows of `DatasetProcessor.prepare()`; without `train`, the config's dataset is prepared.
        resume: go on from the last complete checkpoint.

    Raises:
        HyperionError: the run cannot start or go on; says what, whose, why, and the fix.
    """
    if train is None and config.dataset is None:
        raise DataError("there is no data", why="neither the config nor the call gives any",
                        fix="set dataset: in the config, or pass train_dataset")  # fmt: skip
    planned = make_plan(config, rows=None if train is None else Rows(len(train), len(evaluation) if evaluation else 0))
    folder, checkpoint = claim_output(Path(output_dir), planned.plan, resume=resume)
    ctx = start_context(planned, folder, progress or NoProgress())
    planned.hooks.observe("run_start", plan=planned.plan, ctx=ctx)
    try:
        base = obtain_base(planned, config, ctx)
        tokenizer, new_ids = load_tokenizer(base, config)
        tokens = prepare_data(planned, config, tokenizer, ctx, train, evaluation)
        model = load_base(base, planned, config, tokenizer, new_ids, ctx)
        ctx = with_new_tokens(ctx, new_ids)
        model = attach_adapter(model, planned, config, checkpoint, ctx)
        fitted = fit(model, tokenizer, tokens, planned, config, checkpoint, ctx)
        artifact = leave_artifact(fitted, tokenizer, tokens, planned, config, ctx)
        publish(artifact, config, ctx)
    except BaseException as error:
        planned.hooks.observe("run_error", error=error, ctx=ctx)
        raise
    planned.hooks.observe("run_end", artifact=artifact, ctx=ctx)
    return artifact


def start_context(planned: Planned, folder: Path, progress: Progress) -> RunContext:
    """What every plugin is told about this run; seeds every generator."""
    from transformers import set_seed

    from .models.cache import cache_dir
    from .models.hardware import actual_device

    seed = planned.plan.config["training"]["seed"]
    set_seed(seed)
    use_cpu = planned.plan.config["training"].get("use_cpu", False)
    return RunContext(
        plan=planned.plan,
        seed=seed,
        device="cpu" if use_cpu else actual_device(),
        output=folder,
        cache=cache_dir(),
        progress=progress,
    )


def obtain_base(planned: Planned, config: FinetuneConfig, ctx: RunContext) -> Path:
    """The base model as a local folder in transformers' format: downloaded or converted where it must be."""
    from .models.load import materialize

    base = materialize(
        planned.source,
        ctx.cache,
        ctx.log.info,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if config.quantization is None:
        return base
    quantized = planned.hooks.quantizer(quantizer_name(config)).quantizer_prepare(
        source=base,
        config=config.quantization,
        bits=uniform_bits(config),
        calibration=None,
        folder=ctx.cache / "quantized",
        ctx=ctx,
    )
    return quantized or base


def load_tokenizer(base: Path, config: FinetuneConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer, with the run's new tokens in it, and their ids."""
    from .models.load import load_tokenizer as load
    from .models.new_tokens import add_to_tokenizer

    tokenizer = load(base, trust_remote_code=config.trust_remote_code)
    return tokenizer, add_to_tokenizer(tokenizer, config.new_tokens)


def prepare_data(
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    ctx: RunContext,
    train: Dataset | None,
    evaluation: Dataset | None,
) -> Tokens:
    """Rows to tokens and labels. The objective says what the model reads of a row."""
    from .data.tokenization import tokenize

    provenance: dict[str, Any] = {"kind": "given in Python"}
    if train is None:
        assert planned.processor is not None
        train, evaluation = planned.processor.prepare(progress=ctx.progress)
        provenance = planned.processor.provenance()
    else:
        provenance["fingerprint"] = getattr(train, "_fingerprint", None)
    objective = planned.hooks.plugin("objective", config.objective.type)
    sequences: Callable[..., Any] = partial(objective.objective_sequences, config.objective)  # type: ignore[attr-defined]
    choice = next(choice for choice in planned.plan.choices if choice.kind == "objective")
    identity = f"{choice.distribution} {choice.version} {config.objective.model_dump_json()}"
    tokenized = partial(
        tokenize, tokenizer=tokenizer, sequences=sequences, max_length=config.training.max_length,
        cache_dir=ctx.cache / "tokens", fingerprint_of=identity, progress=ctx.progress,
    )  # fmt: skip
    tokens, report = tokenized(train)
    _tell("training data", report, ctx)
    held_out = None
    if evaluation is not None and len(evaluation):
        held_out, evaluation_report = tokenized(evaluation)
        _tell("evaluation data", evaluation_report, ctx)
    return Tokens(tokens, held_out, report, provenance)


def _tell(what: str, report: TokenReport, ctx: RunContext) -> None:
    ctx.log.info(
        "%s: %d rows, %d tokens, %d of them learnt, longest row %d",
        what, report.rows, report.tokens, report.supervised, report.longest,
    )  # fmt: skip
    for warning in report.warnings:
        ctx.log.warning("%s: %s", what, warning)


def load_base(
    base: Path,
    planned: Planned,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    new_ids: list[int],
    ctx: RunContext,
) -> Module:
    """The base's weights, quantized where the config says so, on the run's device, with rows for the new tokens."""
    from .models.load import load_model
    from .models.new_tokens import grow_embeddings

    load_kwargs: dict[str, Any] = {}
    if config.quantization is not None:
        load_kwargs = planned.hooks.quantizer(quantizer_name(config)).quantizer_load_kwargs(
            source=base, config=config.quantization, bits=uniform_bits(config), ctx=ctx
        )
    model: Module = load_model(
        base,
        dtype=planned.plan.dtype,
        device=ctx.device,
        trust_remote_code=config.trust_remote_code,
        load_kwargs=load_kwargs,
    )
    if config.quantization is not None:
        quantizer = planned.hooks.quantizer(quantizer_name(config))
        model = quantizer.quantizer_after_load(
            model=model, config=config.quantization, bits=uniform_bits(config), training=True
        )
    grow_embeddings(model, tokenizer, new_ids)
    return model


def with_new_tokens(ctx: RunContext, new_ids: list[int]) -> RunContext:
    """The same run, whose adapter is told which embedding rows to train."""
    return replace(ctx, new_token_ids=tuple(new_ids))


def attach_adapter(
    model: Module, planned: Planned, config: FinetuneConfig, checkpoint: Path | None, ctx: RunContext
) -> Module:
    """A fresh adapter on the frozen base, or the checkpoint's."""
    adapter = planned.hooks.adapter(config.adapter.type)
    if checkpoint is not None:
        return adapter.adapter_load(
            model=model, name=ADAPTER_NAME, folder=checkpoint / "adapter", trainable=True, ctx=ctx
        )
    return adapter.adapter_apply(model=model, name=ADAPTER_NAME, config=config.adapter, ctx=ctx)


def fit(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    planned: Planned,
    config: FinetuneConfig,
    checkpoint: Path | None,
    ctx: RunContext,
) -> FitResult:
    """The training loop."""
    from .engine.fit import fit as train_loop

    training = config.training
    return train_loop(
        model,
        tokenizer,
        tokens.train,
        tokens.evaluation,
        arguments={"output_dir": str(ctx.output), **training.arguments(evaluates=tokens.evaluation is not None)},
        hooks=planned.hooks,
        ctx=ctx,
        adapter=(config.adapter.type, config.adapter),
        objective=(config.objective.type, config.objective),
        scheduler=(config.scheduler().type, config.scheduler()),
        early_stopping_patience=training.early_stopping_patience,
        eval_samples=training.eval_samples,
        eval_samples_max_new_tokens=training.eval_samples_max_new_tokens,
        resume=checkpoint,
    )


def leave_artifact(
    fitted: FitResult,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    planned: Planned,
    config: FinetuneConfig,
    ctx: RunContext,
) -> Artifact:
    """Adapter, tokenizer, plan, versions, hashes, metrics, and a model card that tells them."""
    from .monitoring.plot import draw_loss_curve

    planned.hooks.adapter(config.adapter.type).adapter_save(
        model=fitted.model, name=ADAPTER_NAME, config=config.adapter, folder=ctx.output, for_resume=False
    )
    tokenizer.save_pretrained(ctx.output)
    draw_loss_curve(ctx.output / "metrics.jsonl", ctx.output / "loss.png")
    return write_artifact(
        ctx.output,
        planned,
        config,
        metrics=fitted.metrics,
        data={**tokens.provenance, "tokenized": asdict(tokens.report)},
    )


def publish(artifact: Artifact, config: FinetuneConfig, ctx: RunContext) -> None:
    """Upload the artifact, where the config asks for it."""
    if config.training.push_to_hub:
        from .deployment.hub import push

        assert config.training.hub_model_id is not None
        push(artifact, config.training.hub_model_id, private=config.training.hub_private_repo, log=ctx.log.info)
