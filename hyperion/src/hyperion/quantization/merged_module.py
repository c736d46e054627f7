"""Whether a merged weight does what the adapter does there, whatever it is rounded to. Imports torch in functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperion_core.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    WeightAndBias = tuple[Tensor, Tensor | None]

_INPUTS = 64
# By so much of itself may a change be wrong, and by so many standard errors of what rounding would make of it.
_WRONG, _ERRORS = 0.05, 6.0
_ROUNDINGS = 2.0


def refuse_other_change(
    name: str, module: nn.Module, dtype: torch.dtype, used: WeightAndBias, merged: WeightAndBias
) -> None:
    """Ask a linear module, adapter and all, what it makes of random inputs, and how much of that the weight holds.

    Neither an adapter's small effect, nor what the weight is then rounded to, hides that it is lost or wrongly scaled.

    Args:
        module: with its adapter; it takes and gives `dtype`.
        used: weight, float32 (out, in), and bias, (out,), that it has without the adapter.
        merged: those with it.

    Raises:
        ArtifactError: the weight changes otherwise than the module does.
    """
    import torch
    from torch.nn.functional import linear

    weight = used[0]
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, _INPUTS, weight.shape[1], generator=draw).to(weight.device, dtype)
    training = module.training
    with torch.no_grad():
        given = module.eval()(inputs)[0].double()
        before, after = (linear(inputs[0].double(), w.double(), None if b is None else b.double())
                         for w, b in (used, merged))  # fmt: skip
    module.train(training)
    made, held = given - before, after - before
    rounding = max(torch.finfo(dtype).eps, 1e-6) * float(given.norm())
    if not float(held.norm()):
        if float(made.norm()) > _ROUNDINGS * rounding:
            raise _refused(name, "nothing")
        return
    # Rounding is spread over all directions, of which that of the change is one.
    times = float((made * held).sum() / held.square().sum())
    error = rounding / float(held.norm()) / held.numel() ** 0.5
    if not abs(times - 1) <= _WRONG + _ERRORS * error:
        raise _refused(name, f"{1 / times:.3g} times that" if times else "something else")


def _refused(name: str, held: str) -> ArtifactError:
    return ArtifactError(
        f"the merged weight of {name} is not what the adapter does there",
        why=f"of the change that the adapter makes to random inputs, the weight makes {held}",
        fix="it is a fault of the adapter's plugin (adapter_merge_weight): tell its authors, and keep the adapter "
        "apart from the base",
    )
