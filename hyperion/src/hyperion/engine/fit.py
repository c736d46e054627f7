"""From a model with its adapter and tokenized rows to a trained adapter: the loop of one run, set up and ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import TrainingError
from hyperion_core.facts import InForce
from torch.nn import Module
from transformers import TrainingArguments

from ..acceleration.documents import pack_capacity
from ..acceleration.fused import fused
from ..acceleration.layerwise import LayerwiseWeights, layerwise
from ..acceleration.offloading import Place, offloaded
from ..acceleration.packing import drops
from ..acceleration.recomputing import RecomputedLayers
from ..acceleration.streaming import streamed
from ..data.collate import Collator
from ..monitoring.metrics import MetricsFile
from ..monitoring.samples import SampleWriter
from ..monitoring.training_line import TrainingLine
from .arguments import check_arguments, training_arguments
from .batches import Batching
from .borrowed import borrowed
from .checkpointing import ADAPTER_NAME, log_sizes
from .checkpoints import ADAPTER_FOLDER, checkpoints, remove_remains, why_incomplete
from .early_stopping import EarlyStopping
from .engine import Engine
from .events import RunEvents
from .interruption import Interruption
from .out_of_memory import out_of_memory_explained

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from hyperion_core.config import AdapterConfig, PluginConfig
    from hyperion_core.context import RunContext
    from hyperion_core.hooks import RunHooks
    from transformers import PreTrainedTokenizerBase

__all__ = ["FitResult", "check_arguments", "fit", "measure"]

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Speed:
    """What changes how fast a step is computed, and in how much memory, but not what it learns.

    `packing`: rows end to end without padding; None where the model can. `pack_length`: tokens of a pack; None chooses.
    `fused_layers`: norms and MLPs with fewer passes over the activations. `recompute_layers`: how many of the first
    layers compute their activations again; None leaves it to the training arguments. `stream_weights`: those of a base
    that was mapped from its files are let go of layer by layer, or come to the device so. `offload_activations`: where
    activations wait for the backward pass, if not on the device.
    """

    packing: bool | None = None
    pack_length: int | None = None
    fused_layers: bool = True
    recompute_layers: int | None = None
    stream_weights: bool = False
    offload_activations: Place | None = None

    def capacity(self, longest: int, args: TrainingArguments) -> int | None:
        """Tokens of a pack, where the longest row has so many; None pads."""
        # NEFTune scales its noise by the length of what it takes for a row
        if self.packing is False or args.neftune_noise_alpha:
            return None
        return pack_capacity(self.pack_length, longest, args.per_device_train_batch_size, args.device.type)

    def streaming(self, model: Module, device: torch.device) -> AbstractContextManager[LayerwiseWeights | None]:
        """Where the frozen weights are while the model trains: inside, as `stream_weights` asks."""
        if not self.stream_weights:
            return nullcontext()
        return streamed(model) if device.type == "cpu" else layerwise(model, device)


@dataclass(frozen=True)
class FitResult:
    """A trained adapter.

    `metrics`: figures of the whole run ("train_loss", "train_runtime" in seconds, …) and the evaluation ("eval_loss",
    …) of the model that is returned. `steps`: optimizer steps made, those before a resume counted. `model` is the one
    to use: it holds the best adapter where the best was asked for, the last one elsewhere.
    """

    metrics: dict[str, float]
    steps: int
    best_checkpoint: Path | None
    model: Module
    stopped_early: bool


def fit(
    model: Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    evaluation: Dataset | None,
    *,
    arguments: dict[str, Any],
    hooks: RunHooks,
    ctx: RunContext,
    adapter: tuple[str, AdapterConfig],
    objective: tuple[str, PluginConfig],
    scheduler: tuple[str, PluginConfig],
    early_stopping_patience: int | None,
    eval_samples: int,
    eval_samples_max_new_tokens: int,
    speed: Speed,
    resume: Path | None,
) -> FitResult:
    """Train.

    Args:
        model: base with the adapter attached as "default", its trainable parameters in float32.
        train, evaluation: rows with input_ids, labels (-100 = not learnt) and length.
        arguments: for `transformers.TrainingArguments`, output_dir among them.
        adapter, objective, scheduler: (name of the plugin in `hooks`, its config).
        early_stopping_patience: evaluations without a better metric after which to stop; None never stops.
        speed: how the same steps are computed faster.
        eval_samples: rows of `evaluation` that the model answers at each evaluation, for people to read.
        resume: a checkpoint of this run; its adapter is already in the model.

    Raises:
        TrainingError: the arguments do not fit, the loss is not finite, the memory is too small, there is nothing
            to learn or to evaluate, a checkpoint is damaged or in the way, or the model's architecture is not
            understood.
    """
    check_arguments(arguments)
    args = training_arguments(arguments)
    args.eval_on_start = args.eval_on_start and resume is None  # the checkpoint's log holds it already
    _require_a_batch(args, len(train))
    output = Path(args.output_dir)
    metrics, timing, samples = logs = tuple(MetricsFile(output / name) for name in (METRICS, TIMING, SAMPLES))
    _prepare_output(output, logs, resume)
    interruption = Interruption()
    writer = SampleWriter(
        tokenizer,
        evaluation,
        samples,
        count=eval_samples,
        max_new_tokens=eval_samples_max_new_tokens,
        ctx=ctx,
        before_each=interruption.leave_evaluation,
    )
    line = TrainingLine(ctx.progress)
    checkpointing = bool(args.activation_checkpointing)
    longest = max(max(data["length"]) for data in (train, evaluation) if data is not None and len(data))
    batching = Batching(Collator(tokenizer.pad_token_id), speed.capacity(longest, args), sharing=not drops(model))
    faster = fused(model) if speed.fused_layers else nullcontext()
    with (
        borrowed(model, checkpointing=checkpointing),
        faster,
        line,
        out_of_memory_explained(args, longest, lambda: batching),
        interruption,
        speed.streaming(model, args.device) as weights,
    ):
        engine = Engine(
            model, args, hooks=hooks, ctx=ctx, adapter=adapter, objective=objective, scheduler=scheduler,
            train=train, evaluation=evaluation, batching=batching,
            interruption=interruption, logs=logs,
            callbacks=[
                line,
                RunEvents(hooks, ctx, metrics, timing, lambda step: writer.write(model, step)),
                *([RecomputedLayers(speed.recompute_layers)] if checkpointing else []),
                *([EarlyStopping(early_stopping_patience)] if early_stopping_patience else []),
            ],
        )  # fmt: skip
        engine.check_head()
        engine.settle_packing(longest, required=speed.packing is True)
        batching = engine.batching
        hooks.observe("run_model_ready", model=model, in_force=measure(model, args), ctx=ctx)
        place = speed.offload_activations
        with offloaded(model, place, output, weights) if place else nullcontext():
            finished = engine.train(resume_from_checkpoint=str(resume) if resume else None)
        if interruption.requested:
            ctx.log.warning("training was over when the signal came: the artifact is written")
    state = engine.state
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    load_best = bool(args.load_best_model_at_end and best and state.best_global_step != state.global_step)
    if load_best:
        driver = hooks.adapter(adapter[0])
        base = driver.adapter_unload(model=model, name=ADAPTER_NAME)
        model = driver.adapter_load(
            model=base, name=ADAPTER_NAME, folder=best / ADAPTER_FOLDER, trainable=True, ctx=ctx  # type: ignore[operator]
        )  # fmt: skip
    return FitResult(
        metrics={
            **finished.metrics,
            **_evaluation_at(state.log_history, state.best_global_step if load_best else None),
        },
        steps=state.global_step,
        best_checkpoint=best,
        model=model,
        stopped_early=state.global_step < state.max_steps,
    )


def measure(model: Module, args: TrainingArguments) -> InForce:
    """What is really there: parameters by device, types of what trains and of what does not."""
    devices: Counter[str] = Counter()
    kinds: dict[str, set[str]] = {"trainable": set(), "base": set()}
    for parameter in model.parameters():
        devices[str(parameter.device)] += parameter.numel()
        kinds["trainable" if parameter.requires_grad else "base"].add(str(parameter.dtype).removeprefix("torch."))
    dtypes = {kind: ", ".join(sorted(found)) for kind, found in kinds.items() if found}
    return InForce("none", args.world_size, dict(devices), dtypes)


def _require_a_batch(args: TrainingArguments, rows: int) -> None:
    if args.dataloader_drop_last and rows < args.train_batch_size:
        raise TrainingError(
            f"the training data have {rows} rows, fewer than one batch of {args.train_batch_size}",
            why="training.dataloader_drop_last drops the only batch, so nothing would be learnt",
            fix="leave dataloader_drop_last out, or lower training.per_device_train_batch_size",
        )


def _prepare_output(output: Path, logs: Sequence[MetricsFile], resume: Path | None) -> None:
    remove_remains(output)
    if resume is not None:
        fault = why_incomplete(resume)
        if fault:
            raise TrainingError(
                f"cannot resume from {resume}", why=fault, fix="resume from another checkpoint, or start anew elsewhere"
            )
        sizes = log_sizes(resume)
        for log in logs:
            log.cut_to(sizes[log.path.name])
        return
    present = checkpoints(output)
    if present:
        raise TrainingError(
            f"{output} holds the checkpoints of another run ({present[-1].name} is the last)",
            why="a new run would mix its checkpoints with them",
            fix="go on with that run (--resume), choose another output_dir, or delete the folder",
        )
    for log in logs:
        log.clear()


def _evaluation_at(history: list[dict[str, float]], step: int | None) -> dict[str, float]:
    """Figures of the evaluation at `step`, or of the last one."""
    lines = [
        line for line in history if any(key.startswith("eval_") for key in line) and step in (None, line["step"])
    ]  # fmt: skip
    return {key: value for key, value in lines[-1].items() if key.startswith("eval_")} if lines else {}
