"""Muon, for adapters: each matrix moves by as much in all of its directions, whatever its gradient is like."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: five steps of this quintic bring every singular value
# of a matrix between 0.7 and 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Of AdamW's update, as measured by Liu et al. 2025 (Muon is Scalable for LLM Training, arXiv:2502.16982): with it
# learning rates and weight decay that suit AdamW are of the right size here, too.
_ROOT_MEAN_SQUARE = 0.2


class Muon(Optimizer):
    """Matrices by momentum (Nesterov's) whose singular values are all made about 1; all else by AdamW.

    Matrices are all parameters of two dimensions, neither of which is 1: LoRA's A and B. Their momentum is the first of
    `betas`; the second, and `eps`, are AdamW's, for all else: vectors of magnitudes and scales, biases. Weight decay is
    decoupled. Pretraining takes a momentum of 0.95; over the few steps of fine-tuning 0.9, AdamW's, came further
    (SmolLM2-135M, 38 steps of 4 rows, held-out loss on two tasks: 1.771 and 0.043; with 0.95 1.777 and 0.049).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is called first, and what it gives comes back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if parameter.ndim == 2 and min(parameter.shape) > 1:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
                else:
                    self._adam(parameter, group)
            for parameters in alike.values():
                self._orthogonal(parameters, group["lr"], group["betas"][0])
        return loss

    def _orthogonal(self, parameters: list[Tensor], rate: float, beta: float) -> None:
        """Of matrices of one shape, (m, n), together."""
        directions = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(gradient, 1 - beta)
            directions.append(gradient.lerp(momentum, beta))
        size = _ROOT_MEAN_SQUARE * math.sqrt(max(parameters[0].shape))
        for parameter, direction in zip(parameters, orthogonalized(torch.stack(directions)), strict=True):
            parameter.add_(direction, alpha=-rate * size)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step = state["step"]
        spread = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, spread, value=-group["lr"] / (1 - first**step))


def orthogonalized(matrices: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, (count, m, n), nearly: by Newton-Schulz iterations, without a decomposition.

    In bfloat16 on a GPU, which is enough for them; in the matrices' own type on a CPU, where that is no gain.
    """
    given, (rows, columns) = matrices.dtype, matrices.shape[-2:]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.mT if rows > columns else x  # the smaller side's products
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = first * x + (third * square + fifth * square @ square) @ x
    return (x.mT if rows > columns else x).to(given)
