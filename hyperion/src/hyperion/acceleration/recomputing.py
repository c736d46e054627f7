"""Activations of some layers computed again in the backward pass, in place of keeping them."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


class RecomputedLayers(TrainerCallback):
    """Puts right what transformers does when it switches checkpointing (Chen et al. 2016, arXiv:1604.06174) on.

    Args:
        count: layers that compute again; None is all. They are the first ones, since the backward pass comes to them
            last: by then the others have given their activations back, and what is computed again does not add to the
            peak.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: Module, **kwargs: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if self.count is not None:
            for layer in layers[self.count :]:
                layer.gradient_checkpointing = False
        # transformers lets the embeddings' outputs carry gradient, which only reentrant checkpointing needs: the
        # backward pass would run down to them, below the first layer that has anything to learn
        if not (args.activation_checkpointing_kwargs or {}).get("use_reentrant", False) and hasattr(
            model, "disable_input_require_grads"
        ):
            model.disable_input_require_grads()
