"""What flows into linear modules, as methods that look at data want it. Imports torch in functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hyperion_core.context import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def second_moments(
    model: Module, modules: Mapping[str, Module], rows: Iterable[Mapping[str, Tensor]], progress: Progress
) -> dict[str, Tensor]:
    """The mean of x xᵀ over the inputs x of each of `modules`: float32 (in, in).

    No token of padding is counted. A module that no token comes to, as an expert's may be, is left out.

    Args:
        modules: of `model`, by name.
        rows: `input_ids` and `attention_mask`, int64 (B, T).
    """
    import torch

    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def added(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def before(module: Any, args: tuple[Tensor, ...]) -> None:
            reads = args[0].detach().flatten(0, -2).float()
            sums[name] = torch.addmm(sums[name], reads.T, reads) if name in sums else reads.T @ reads
            counts[name] += len(reads)

        return before

    device = next(model.parameters()).device
    lines = [
        ids[mask.bool()][None]
        for row in rows
        for ids, mask in zip(row["input_ids"], row["attention_mask"], strict=True)
    ]
    with ExitStack() as stack, progress.task("looking at what flows into modules", len(lines)) as advance:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(added(name)).remove)
        for ids in lines:
            with torch.no_grad():
                model(input_ids=ids.to(device), use_cache=False)
            advance(1)
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
