"""ModelFacts of a model that is loaded: the same facts as from its files, for when those could not be read.

Reads attributes only, so that it needs no torch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from .facts import ModelFacts, ModuleFact, is_output_head

if TYPE_CHECKING:
    from torch.nn import Module


def live_model_facts(model: Module, *, unwrap: Callable[[Any], Any] = lambda module: module) -> ModelFacts:
    """The facts of `model`, from its modules and its config.

    The output head is left out when it shares its weight with the embedding.

    Args:
        unwrap: gives the base's own module for one that an adapter has put in its place.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    modules = list(_owners(model, "", unwrap))
    embeddings = {id(module.weight) for name, module in modules if _kind(module) == "embedding"}
    shared = {name for name, module in modules if is_output_head(name) and id(_weight(module)) in embeddings}
    facts = tuple(_fact(name, module) for name, module in modules if name not in shared)
    return ModelFacts(
        source=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        model_type=getattr(text, "model_type", "") or "",
        modules=facts,
        hidden_size=getattr(text, "hidden_size", 0) or 0,
        layers=getattr(text, "num_hidden_layers", 0) or 0,
        vocab_size=getattr(text, "vocab_size", 0) or 0,
        context_length=getattr(text, "max_position_embeddings", 0) or 0,
        tied_embeddings=bool(shared),
        why_unknown="" if facts else "the model has no modules with weights",
    )


def _owners(module: Any, prefix: str, unwrap: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """(name, module) of every module with a weight of its own, in the order of the model: a quantized linear module is
    one too, whatever it calls the tensors that hold its weight."""
    for name, child in module.named_children():
        full, own = f"{prefix}{name}", unwrap(child)
        if _weight(own) is not None or _linear_shape(own):
            yield full, own
        yield from _owners(own, f"{full}.", unwrap)


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)


def _kind(module: Any) -> Literal["linear", "embedding", "norm", "other"]:
    if hasattr(module, "embedding_dim"):
        return "embedding"
    if _linear_shape(module):
        return "linear"
    return "norm" if module.weight.ndim == 1 else "other"


def _linear_shape(module: Any) -> tuple[int, int] | None:
    """(out, in) by the sizes that a linear module declares: a quantized one holds a packed weight."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D
        return int(module.nf), int(module.nx)
    return None


def _fact(name: str, module: Any) -> ModuleFact:
    shape = _linear_shape(module) or tuple(module.weight.shape)
    return ModuleFact(name, _kind(module), shape, getattr(module, "bias", None) is not None)
