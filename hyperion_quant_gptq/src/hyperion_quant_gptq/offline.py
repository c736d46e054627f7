"""A base model's folder in, a checkpoint of GPTQ out. Loaded only with torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, ModelError
from hyperion_core.facts import BitPlan
from hyperion_core.quiet import ON_IMPORT, errors_only
from torch import Tensor

from .calibrated import quantize, rounded_head, sequences
from .config import GptqConfig
from .distillation import distill
from .grouping import layouts
from .packed_embedding import pack_embeddings, refuse_unpackable
from .packed_linear import facts_of, packed_modules
from .saved_format import written


def quantize_folder(
    source: Path, config: GptqConfig, bits: BitPlan, rows: Iterable[Mapping[str, Tensor]], folder: Path, ctx: RunContext
) -> None:
    """Write the model in `source`, quantized, into `folder`; what is not quantized keeps its type and its bits.

    The global random states stay as they are. On a CPU it computes in float32, else in the type that the model has.

    Raises:
        HyperionError: there are no rows, or the model cannot be loaded or quantized.
    """
    rows = list(rows)
    sequences(rows, 0)  # before anything large is loaded
    on_gpu = ctx.device != "cpu"
    devices = [torch.cuda.current_device()] if on_gpu else []
    with torch.random.fork_rng(devices=devices), _quiet():
        model = _loaded(source, ctx)
        types = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        if not on_gpu:
            model.float()
        facts = facts_of(model)
        planned = layouts(facts, bits)
        if not planned:
            raise CompatibilityError(
                "there is nothing to quantize",
                why="the plan leaves every linear module of the layers as it is",
                fix="give some of them 8 bits or fewer, or leave quantization out",
            )
        tokens = sequences(rows, facts.context_length)
        if config.embedding_bits:
            refuse_unpackable(model)
        quantize(model, planned, config, tokens, ctx)
        if config.embedding_bits:
            pack_embeddings(
                model, config.embedding_bits, rounded_head(model, config.embedding_bits, config, tokens, ctx)
            )
        if config.distill_steps:
            distill(model, partial(_teacher, source, ctx), config.distill_steps, tokens, ctx)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in types:
                tensor.data = tensor.data.to(types[name])
        packed = packed_modules(model)
        left = [fact.name for fact in facts.linear() if fact.name not in packed]
        model.config.quantization_config = written(config, packed, left, 1, config.embedding_bits)
        model.save_pretrained(folder)


def _teacher(source: Path, ctx: RunContext) -> Any:
    model = _loaded(source, ctx)
    return model.float() if ctx.device == "cpu" else model


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers logs errors only and draws no bars, and so does what it imports."""
    with errors_only(*ON_IMPORT):
        from transformers.utils import logging

        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _loaded(source: Path, ctx: RunContext) -> Any:
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {"device_map": {"": ctx.device}} if ctx.device != "cpu" else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=bool(ctx.plan.config.get("trust_remote_code", False)),
            **kwargs,
        ).eval()
    except Exception as error:  # whatever somebody's files run into
        raise ModelError(
            f"{source} cannot be loaded to be quantized",
            why=f"{type(error).__name__}: {error}",
            fix="check that the folder is whole, and that the installed transformers knows its model_type",
        ) from error
