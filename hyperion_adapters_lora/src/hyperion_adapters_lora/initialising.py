"""From a config and a base to the first values of every wrapped module. Loaded only with torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from hyperion_core.context import RunContext
from hyperion_core.facts import ModuleFact
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperion_peft import attach

from . import measuring, start
from .config import LoraConfig
from .start import Start

#: Rows that eva and lora_ga look at, unless init_rows says otherwise.
ROWS = 16
_IDENTITY_ROWS = 512


def from_weights(
    model: nn.Module, config: LoraConfig, modules: Mapping[str, tuple[int, float]], ctx: RunContext
) -> dict[str, Start]:
    """PiSSA or OLoRA. `modules`: (rank, scaling) of each, by name in the base."""
    base = attach.base_of(model)
    found = {}
    with (
        attach.without_adapters(model),
        torch.no_grad(),
        ctx.progress.task("decomposing weights", len(modules)) as advance,
    ):
        for name, (rank, scaling) in modules.items():
            weight = full_weight(base.get_submodule(name), _activations_dtype(base))
            found[name] = (
                start.olora(weight, rank)
                if config.init_lora_weights == "olora"
                else start.pissa(weight, rank, scaling, config.passes, ctx.seed)
            )
            advance(1)
    return found


def from_data(
    model: nn.Module,
    config: LoraConfig,
    ranks: Mapping[str, int],
    facts: Iterable[ModuleFact],
    batches: Iterable[Mapping[str, Tensor]],
    ctx: RunContext,
) -> dict[str, Start]:
    """EVA or LoRA-GA. `ranks` by name in the base; a module that no row reaches starts as plain LoRA does.

    Raises:
        CompatibilityError: no row has anything to learn.
    """
    base = attach.base_of(model)
    modules = {name: base.get_submodule(name) for name in ranks}
    shapes = {fact.name: cast("tuple[int, int]", fact.shape) for fact in facts}
    rows = measuring.read_rows(batches, config.init_rows or ROWS)
    found, missed = {}, []
    with attach.without_adapters(model):
        if config.init_source == "activations":
            widths = {name: shapes[name][1] for name in ranks}
            sums = measuring.second_moments(base, modules, widths, rows, ctx.progress)
        else:
            sums = measuring.gradients(base, modules, {name: shapes[name] for name in ranks}, rows, ctx.progress)
        for name, total in sums:
            reached = bool(total.any())
            if not reached:
                missed.append(name)
            if config.init_source == "gradients":
                found[name] = (start.lora_ga if reached else _plain)(total, ranks[name], ctx.seed)
            elif reached:
                found[name] = start.eva(total, ranks[name], ctx.seed)
    if missed:
        ctx.log.warning(
            "no token of the first %d rows goes through these modules, which start as plain LoRA (%d): %s",
            len(rows), len(missed), ", ".join(missed[:3]),
        )  # fmt: skip
    return found


def full_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight with which a linear module computes, fp32 (out, in); of a quantized one by what it makes of the
    identity, whoever wrote it.

    Args:
        dtype: of the activations that it is given.
    """
    if type(module) is nn.Linear:
        return module.weight.detach().float()
    if type(module) is Conv1D:
        return module.weight.detach().T.float()
    wrapped = cast(Any, module)
    width = wrapped.in_features
    device = measuring.device_of(module)
    bias = module(torch.zeros(1, width, dtype=dtype, device=device))
    identity = torch.eye(width, dtype=dtype, device=device)
    columns = [(module(rows) - bias).float() for rows in identity.split(_IDENTITY_ROWS)]
    return torch.cat(columns).T.contiguous()


def _plain(gradient: Tensor, rank: int, seed: int) -> Start:
    """As PEFT starts: A random, B zero. `gradient`: (out, in)."""
    out, width = gradient.shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        down = nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5))
    return Start(down, torch.zeros(out, rank))


def _activations_dtype(base: Any) -> torch.dtype:
    return cast(torch.dtype, base.get_input_embeddings().weight.dtype)
