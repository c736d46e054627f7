"""The kit's own trainable delta: y = module(x) + B·A·x, by forward hooks. Stands in for any adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

RANK = 4


class LowRankDelta:
    """Attached to the named modules of a model while it exists; `remove` takes it away.

    The modules are asked for `in_features` and `out_features` alone, as adapters may.
    """

    def __init__(self, model: Module, modules: Iterable[str]) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.parameters: list[Parameter] = []
        self._handles = []
        for name in modules:
            module: Any = model.get_submodule(name)
            device = next(iter([*module.parameters(), *module.buffers()])).device
            a = torch.nn.Parameter((torch.randn(RANK, module.in_features, generator=generator) * 0.1).to(device))
            b = torch.nn.Parameter(torch.zeros(module.out_features, RANK, device=device))
            self.parameters += [a, b]
            self._handles.append(module.register_forward_hook(_adds(a, b)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _adds(a: Parameter, b: Parameter) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return hook
