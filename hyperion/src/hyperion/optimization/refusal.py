"""Training that cannot fit is refused before the weights load; where computing again makes it fit, layers do."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from hyperion_core.errors import CompatibilityError, HyperionError
from hyperion_core.facts import MiB

from ..memory import counted
from ..models.facts import model_facts
from ..models.hardware import free_memory
from ..models.source import resolve_source
from ..planning import Planned
from .candidate import Candidate, Forecaster, parts
from .recomputing_choice import SHARE, choice_line, fewest, may_choose, recomputing
from .row_lengths import RowLengths, row_lengths
from .search import search

if TYPE_CHECKING:
    from datasets import Dataset

_ALWAYS = ("weights", "adapter", "gradients", "optimizer")
# How far above the free memory a forecast must lie before a run is refused for it. Of the 84 runs of
# benchmarks/results/memory-prediction.md it was from 9.5% too low to 18.5% too high, and more than 15% too high of two:
# such a run is refused that would have left less than a thirtieth of the memory free. On a GPU, where nothing was
# measured, the same tensors are counted, and nothing for the holes between them.
MARGIN = 0.15
_ESCAPE = "training.memory_check: false tries it all the same"


def refuse_what_cannot_fit(planned: Planned) -> None:
    """Compare what a run holds whatever its rows are with the memory that is free.

    Weights, adapter, gradients and optimizer are there in every step, so there is no margin to give. Activations are
    left out: the plan reckons with rows of max_length, and those of the data may be shorter. So are weights that are
    streamed from their files. Where nothing is known of the model, or of the free memory, nothing is refused.

    Raises:
        CompatibilityError: the run takes more; names the parts, and the settings nearest to it that fit.
    """
    held = _ALWAYS[1:] if planned.config.training.stream_weights else _ALWAYS
    needed = sum(planned.plan.memory.get(part, 0) for part in held)
    free = free_memory(planned.plan.device) if planned.config.training.memory_check else None
    if not needed or free is None or needed <= free:
        return
    raise CompatibilityError(
        f"the run takes more than {needed / MiB:,.0f} MiB on {planned.plan.device}, and {free / MiB:,.0f} MiB are free",
        why=f"in MiB: {parts(planned.plan.memory)}",
        fix=_nearest(planned, free, None),
    )


def within_memory(planned: Planned, base: Path, train: Dataset, log: logging.Logger) -> Planned:
    """Compare the forecast with the rows that the data really has with the memory that is free.

    Where that is not enough, as few layers as it asks for compute their activations again (Chen et al. 2016,
    arXiv:1604.06174), which is the same to the bit; unless the config says how many, or that its memory is not looked
    at. Where activations are not counted tensor by tensor, how far the forecast is off is not known: then nothing is
    changed and nothing refused, and `log` warns. Where nothing is known of the model, or of the free memory, there is
    nothing to say.

    Args:
        base: its folder; that of a hub model may not have been there when the run was planned.
        train: tokenized rows.

    Returns:
        The plan, with the layers that compute again.

    Raises:
        CompatibilityError: the run takes more than that, by `MARGIN`; names the parts, and the settings nearest to it
            that fit.
    """
    training, device = planned.config.training, planned.plan.device
    source = resolve_source(str(base))
    free, facts = free_memory(device) if training.memory_check else None, model_facts(source)
    if free is None or not facts.known:
        return planned
    lengths = row_lengths(train, training)
    forecaster = Forecaster(planned.asked, source, facts, device, lengths=lengths)
    run = forecaster.candidate(training.given())
    known = counted(training, facts)
    if known and may_choose(planned.asked.training):
        tried = cache(lambda count: forecaster.candidate(recomputing(training, count)))
        count = fewest(facts.layers, lambda count: tried(count).peak <= free * SHARE)
        count = count if tried(count).peak < tried(0).peak else 0
        if count != run.step.checkpointed:
            run, line = tried(count), choice_line(count, facts.layers)
            planned = _with_layers(planned, run, line)
            log.info("training.recompute_layers: %s, for %s MiB are free", line, f"{free / MiB:,.0f}")
    if run.peak <= free * (1 + MARGIN):
        return planned
    what = f"the run is forecast to take {run.peak / MiB:,.0f} MiB on {device}, and {free / MiB:,.0f} MiB are free"
    if not known:
        log.warning("%s; how far that forecast is off was not measured for such a run, so it goes on", what)
        return planned
    why = f"in MiB: {parts(run.memory)}; the longest row has {lengths.longest} tokens"
    raise CompatibilityError(what, why=why, fix=_nearest(planned, free, lengths))


def _with_layers(planned: Planned, run: Candidate, line: str) -> Planned:
    """The plan of the same run, with the layers of `run` computed again."""
    config = planned.config.replace(training=run.config.training.given())
    settings = {**planned.plan.settings, "recompute_layers": line}
    plan = replace(planned.plan, config=config.as_data(), settings=settings, memory=run.memory)
    return replace(planned, config=config, plan=plan)


def _nearest(planned: Planned, free: int, lengths: RowLengths | None) -> str:
    """What to do: the keys of the settings nearest to the run's that fit, where there are any."""
    try:
        # the process is there already: it is not in what is free
        found = search(planned.asked, free, planned.plan.device, "nearest", process=0, lengths=lengths).chosen
    except HyperionError as error:
        return f"nothing that was tried fits ({error.what}): give it more memory, or choose a smaller base; {_ESCAPE}"
    keys = yaml.safe_dump(found.lines(planned.asked), default_flow_style=True, sort_keys=False, width=10**6).strip()
    return f"these keys fit, in {found.peak / MiB:,.0f} MiB: {keys}; {_ESCAPE}"
