"""Whether two choices of one run fit, by what they declare, never by their names. Torch-free: asked while planning."""

from __future__ import annotations

from .errors import Problem
from .kinds import Adapter, Quantizer

_MEANING = {
    "forward": "calls to its modules",
    "dequantize": "its weights in full precision",
}


def check_pair(adapter: type[Adapter], quantizer: type[Quantizer] | None) -> Problem | None:
    """What an adapter needs of the base and a quantizer does not provide, or None when they fit.

    Without a quantizer the base is in full precision, and gives everything.
    """
    if quantizer is None:
        return None
    lacking = sorted(adapter.capabilities.needs - quantizer.provides.offers())
    if not lacking:
        return None
    needs = " and ".join(f'"{need}" ({_MEANING.get(need, "unknown to this contract")})' for need in lacking)
    return Problem(
        "quantization",
        f"the adapter {adapter.__name__} cannot work on a base quantized by {quantizer.__name__}",
        f"it needs {needs} of the base, and this quantizer does not provide that",
        "leave out quantization, or choose a quantizer that provides it, or another adapter",
    )
