"""The model that training borrows: how it runs is given back as it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module


@contextmanager
def borrowed(model: Module, *, checkpointing: bool) -> Iterator[None]:
    """Inside, the trainer may lay autocast round `forward`, recompute activations and switch the cache off.

    Args:
        checkpointing: activations will be recomputed in the backward pass; transformers then makes the embeddings'
            outputs carry gradient, too.
    """
    own_forward = vars(model).get("forward")
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    training = model.training
    try:
        yield
    finally:
        if checkpointing:
            _call(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")
            _call(model, "disable_input_require_grads")
        # accelerate sets both on the instance, over the class's method
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)
        if own_forward is not None:
            model.forward = own_forward
        if use_cache is not None:
            config.use_cache = use_cache
        model.train(training)


def _call(model: Module, *names: str) -> None:
    """The first of these methods that the model has; a model outside transformers may have none."""
    for name in names:
        if hasattr(model, name):
            getattr(model, name)()
            return
