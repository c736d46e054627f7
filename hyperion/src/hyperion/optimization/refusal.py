"""Training that cannot fit is refused before the weights load."""

from __future__ import annotations

from hyperion_core.errors import CompatibilityError, HyperionError
from hyperion_core.facts import MiB

from ..models.hardware import free_memory
from ..planning import Planned
from .search import described, search

_ALWAYS = ("weights", "adapter", "gradients", "optimizer")


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
    free = free_memory(planned.plan.device)
    if not needed or free is None or needed <= free:
        return
    parts = ", ".join(f"{part} {size / MiB:,.0f}" for part, size in planned.plan.memory.items())
    try:
        # the process is there already: it is not in what is free
        nearest = search(planned.config, free, planned.plan.device, process=0).chosen
        fix = f"this fits: {described(nearest)}; its keys: hyperion plan CONFIG --memory {free // MiB}MiB"
    except HyperionError as error:
        fix = f"nothing that was tried fits ({error.what}): give it more memory, or choose a smaller base model"
    raise CompatibilityError(
        f"the run takes more than {needed / MiB:,.0f} MiB on {planned.plan.device}, and {free / MiB:,.0f} MiB are free",
        why=f"in MiB: {parts}",
        fix=fix,
    )
