"""A finished run's model, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hyperion_core.artifact import ADAPTER, Artifact
from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.hooks import RunHooks
from hyperion_core.plan import Plan
from hyperion_core.registry import registry

from ..quantization.base import load_quantizable
from .cache import cache_dir
from .hardware import actual_device, choose_dtype
from .load import load_tokenizer, materialize
from .new_tokens import grow_embeddings
from .source import resolve_source

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TunedModel:
    """Base, adapter and tokenizer of an artifact; unpacks into (model, tokenizer)."""

    model: Module
    tokenizer: PreTrainedTokenizerBase
    hooks: RunHooks
    adapter: str

    def __iter__(self) -> Any:
        return iter((self.model, self.tokenizer))

    def use_adapter(self, wanted: bool) -> None:
        """Switch between the tuned model and its base."""
        self.hooks.adapter(self.adapter).adapter_activate(model=self.model, weights={"default": 1.0} if wanted else {})


def load_tuned(folder: str | Path, *, base_model: str | None = None, dtype: str = "auto") -> TunedModel:
    """Load an artifact for inference.

    Args:
        folder: the `output_dir` of a finished run.
        base_model: where the base lies now, if not where it was.
        dtype: "auto", "float32", "bfloat16" or "float16", of the base's weights.

    Raises:
        ArtifactError: it is no finished artifact, or not one of this base.
        PluginError: its adapter plugin is not installed, or broken.
        ModelError: the base cannot be had.
    """
    import torch

    artifact = Artifact.read(folder)
    name = str(artifact.adapter["type"])
    hooks = RunHooks()
    hooks.add(registry().create("adapter", name), name)
    device = actual_device()
    source = (
        resolve_source(base_model)
        if base_model
        else resolve_source(str(artifact.adapter["base_model"]), artifact.adapter.get("revision"), artifact.folder)
    )
    plan = Plan(config={}, choices=(), device=device, dtype=choose_dtype(dtype, device))
    ctx = RunContext(plan=plan, seed=0, device=device, output=artifact.folder, cache=cache_dir())
    base = materialize(source, ctx.cache, ctx.log.info)
    tokenizer = load_tokenizer(artifact.folder)
    quantization = _quantization(artifact, hooks)
    model: Module = load_quantizable(
        base, quantization, hooks, ctx, training=False, calibration_hash=artifact.adapter.get("calibration")
    )
    new_ids = [tokenizer.get_vocab()[token] for token in artifact.adapter.get("new_tokens", [])]
    grow_embeddings(model, tokenizer, new_ids)
    with torch.no_grad():
        model = hooks.adapter(name).adapter_load(
            model=model, name="default", folder=artifact.folder, trainable=False, ctx=ctx
        )
    return TunedModel(model.eval(), tokenizer, hooks, name)


def _quantization(artifact: Artifact, hooks: RunHooks) -> QuantizationConfig | None:
    """How the base was quantized while it was trained on, and its quantizer among `hooks`; None where it was not."""
    saved = artifact.adapter.get("quantization")
    if saved is None:
        return None
    method = str(saved["method"])
    plugin = registry().create("quantizer", method)
    hooks.add(plugin, method)
    config = plugin.config_class.parse(saved, source=str(artifact.folder / ADAPTER))
    return cast(QuantizationConfig, config)
