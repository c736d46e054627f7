"""What it costs to hold a module in so many bits: the expected loss increase, measured on calibration data.

Near a trained model the loss rises as a quadratic form of the weights' error ΔW. Its matrix is the Fisher information:

    ΔL(module, bits)  ≈  ½ E[ (Σ_t g_tᵀ ΔW x_t)² ]  ≈  ½ E[ Σ_t (g_tᵀ ΔW x_t)² ]

x_t is what the module reads at token t, g_t the gradient of the loss at what it gives. The tokens to predict are drawn
from the model's own distribution: this is the Fisher information, and its "empirical" namesake with the data's tokens
is another thing (Kunstner et al. 2019, arXiv 1905.12558). So ΔL is the divergence of the quantized model's predictions
from the model's, in nats a token. Products of two tokens are left out: from few rows they are mostly noise.

It comes from these, and differs from each in one thing:

- HAWQ (arXiv 1905.03696) and HAWQ-V2 (1911.03852) weigh ‖ΔW‖² with the Hessian's largest eigenvalue, or its trace;
  APTQ (2402.14866) does so with attention in view. Here the error meets the directions that it lies in.
- SqueezeLLM (2306.07629) keeps the diagonal of the Fisher matrix, Σ F_ii ΔW_ii²; NVIDIA's ModelOpt (AutoQuantize) sums
  squares of gradient times error over a module's outputs. Here all weights of a module act together in each token.
- SpQR (2306.03078) weighs an error with the inputs alone. Here the loss says which outputs matter.
- LLM-MQ (Li et al., NeurIPS 2023 workshop ENLSP) takes the first-order term |g·ΔW|, which is about zero after training.

`benchmarks/adaptive_bits.py` compares them with the truth. Left out is that errors of several modules act on each other
(losses are simply added), and what is beyond second order: at the coarsest widths it is more a ranking than a forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hyperion_core.config import QuantizationConfig
from hyperion_core.context import NoProgress, Progress
from hyperion_core.errors import ModelError
from hyperion_core.specs import QuantizerSpecs

from .second_moments import second_moments

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

METHOD = "Fisher information of each token, targets drawn from the model"
_UNQUANTIZED = 16
# Tokens that go through the model at once, and numbers in their logits: both only bound the memory.
_MOST_TOKENS = 2048
_MOST_LOGITS = 2**27
# Bytes of rounding errors that are held at once; a larger model is measured part by part.
_MOST_HELD = 2**32


@dataclass(frozen=True)
class Sensitivity:
    """`loss_increase` is in nats a token, by module and bits, 0 at 16 bits; `tokens` were measured on."""

    loss_increase: Mapping[str, Mapping[int, float]]
    tokens: int
    method: str = METHOD

    def to_json(self) -> dict[str, Any]:
        """Plain data; the losses with six digits."""
        losses = {
            name: {str(bits): float(f"{loss:.6g}") for bits, loss in sorted(of.items())}
            for name, of in self.loss_increase.items()
        }
        return {"method": self.method, "tokens": self.tokens, "loss_increase": losses}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sensitivity:
        """The inverse.

        Raises:
            KeyError, TypeError, ValueError: it is no such data.
        """
        losses = {
            str(name): {int(bits): float(loss) for bits, loss in of.items()}
            for name, of in content["loss_increase"].items()
        }
        return cls(losses, int(content["tokens"]), str(content["method"]))


def measure_sensitivity(
    model: Module,
    quantizer: QuantizerSpecs,
    config: QuantizationConfig,
    candidates: Mapping[str, Collection[int]],
    group_size: int,
    rows: Iterable[Mapping[str, Tensor]],
    progress: Progress | None = None,
    *,
    looks_at_data: bool = False,
    seed: int = 0,
) -> Sensitivity:
    """Loss increases of every module that `candidates` names, at every width that it gives it.

    Each row goes forward and backward through the unquantized model once (a large one: once for each part of it whose
    rounding errors are held at a time). The model stays as it is to the bit, its mode too, and so do the global random
    states; the same arguments give the same figures.

    Args:
        model: a causal language model; on any device, in any float type (sums are kept in double precision).
        candidates: as `allocation.module_sizes` gives them. 16 bits cost nothing.
        rows: `input_ids` and `attention_mask`, int64 (B, T).
        looks_at_data: the quantizer rounds by what flows into a module; it is shown that, from the same rows.
        seed: of the draw of the tokens that are predicted.

    Raises:
        ModelError: a figure is not finite.
    """
    import torch

    progress = progress or NoProgress()
    modules = {name: model.get_submodule(name) for name in candidates}
    widths = {name: sorted(set(of) - {_UNQUANTIZED}) for name, of in candidates.items()}
    sums = {name: dict.fromkeys(of, 0.0) for name, of in widths.items()}
    given = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    vocabulary = int(model.config.get_text_config().vocab_size)
    batches = list(_batches(given, max(1, min(_MOST_TOKENS, _MOST_LOGITS // vocabulary))))
    device = next(model.parameters()).device
    parts = _parts({name: _bytes_held(module, len(widths[name]), looks_at_data) for name, module in modules.items()})
    tokens = 0
    with _frozen(model):
        for part in parts:
            chosen = {name: modules[name] for name in part}
            stats: Mapping[str, Tensor] = second_moments(model, chosen, given, progress) if looks_at_data else {}
            errors: dict[str, dict[int, Tensor]] = {}
            with progress.task("rounding modules at every width", len(part)) as advance:
                for name, module in chosen.items():
                    shown = {"second_moment": stats[name]} if name in stats else None
                    round_it = partial(
                        quantizer.quantizer_fake_quantize, config=config, group_size=group_size, stats=shown
                    )
                    weight = _weight(module)
                    errors[name] = {
                        bits: round_it(weight=weight, bits=bits).float() - weight.float() for bits in widths[name]
                    }
                    advance(1)
            draw = torch.Generator(device).manual_seed(seed)  # all parts are to predict the same tokens
            with ExitStack() as stack, progress.task("measuring the bits' losses", len(given)) as advance:
                for name, module in chosen.items():
                    stack.enter_context(_watched(module, partial(_weigh, errors[name], sums[name])))
                tokens = 0
                for batch in batches:
                    tokens += _forward_and_backward(model, batch, device, draw)
                    advance(len(batch))
    found = {name: {bits: total / max(tokens, 1) for bits, total in of.items()} for name, of in sums.items()}
    if odd := [name for name, of in found.items() if not all(map(math.isfinite, of.values()))]:
        raise ModelError(
            f"what the bits of {odd[0]} cost cannot be measured ({len(odd)} modules)",
            why="the gradients there are not finite",
            fix="measure in another type: dtype: float32 or bfloat16",
        )
    return Sensitivity({name: {**of, _UNQUANTIZED: 0.0} for name, of in found.items()}, tokens)


def _weigh(errors: Mapping[int, Tensor], sums: dict[int, float], inputs: Tensor, gradient: Tensor) -> None:
    import torch

    reads, gives = inputs.flatten(0, -2).float(), gradient.flatten(0, -2).float()
    for bits, error in errors.items():
        change = ((reads @ error.T) * gives).sum(-1, dtype=torch.float64)
        sums[bits] += 0.5 * float(change.square().sum())


def _bytes_held(module: Module, widths: int, looks_at_data: bool) -> int:
    rows, columns = _weight(module).shape
    return 4 * columns * (rows * widths + (columns if looks_at_data else 0))


def _parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, as many together as can be held."""
    parts: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not parts or size > left:
            parts.append([])
            left = _MOST_HELD
        parts[-1].append(name)
        left -= size
    return parts


def _forward_and_backward(
    model: Module, batch: list[Mapping[str, Tensor]], device: torch.device, draw: torch.Generator
) -> int:
    """Gradients of the summed loss over tokens that are drawn from the model's own predictions; gives their number."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(name: str) -> Tensor:
        return pad_sequence([line for row in batch for line in row[name]], batch_first=True).to(device)

    mask = padded("attention_mask")
    with torch.enable_grad():
        logits = model(input_ids=padded("input_ids"), attention_mask=mask, use_cache=False).logits
    predicts = (mask[:, :-1] * mask[:, 1:]).bool()  # the last token of a row predicts nothing that is known to follow
    gradient = torch.zeros_like(logits)
    predicted = logits.detach()[:, :-1][predicts].float().softmax(-1)
    drawn = torch.multinomial(predicted, 1, generator=draw)
    gradient[:, :-1][predicts] = predicted.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=torch.float32)).to(
        logits.dtype
    )
    del predicted
    logits.backward(gradient)
    return int(predicts.sum())


def _batches(rows: list[dict[str, Tensor]], most_tokens: int) -> Iterator[list[Mapping[str, Tensor]]]:
    """Rows of like length together, so that little is padded."""
    batch: list[Mapping[str, Tensor]] = []
    longest = lines = 0
    for row in sorted(rows, key=lambda row: row["input_ids"].shape[1]):
        longest, lines = row["input_ids"].shape[1], lines + row["input_ids"].shape[0]
        if batch and longest * lines > most_tokens:
            yield batch
            batch, lines = [], row["input_ids"].shape[0]
        batch.append(row)
    if batch:
        yield batch


@contextmanager
def _frozen(model: Module) -> Iterator[None]:
    """In evaluation mode, no gradient kept for a weight; autograd starts at the embeddings' output."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    embeddings: Any = model.get_input_embeddings()
    start = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        start.remove()
        for weight, requires_grad in wanted:
            weight.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


@contextmanager
def _watched(module: Module, tell: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Tells of each pass what the module read and the gradient at what it gave, as soon as that is known: neither is
    kept for longer."""

    def after_forward(module: Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()
        if output.requires_grad:  # what does not depend on the tokens is not measured: no token's loss depends on it
            output.register_hook(lambda gradient: tell(inputs, gradient.detach()))

    hook = module.register_forward_hook(after_forward)
    try:
        yield
    finally:
        hook.remove()


def _weight(module: Module) -> Tensor:
    """(out, in). Transformers' Conv1D holds it the other way round."""
    held: Any = module.weight
    weight: Tensor = held.detach()
    return weight.T.contiguous() if hasattr(module, "nf") and hasattr(module, "nx") else weight
