"""A model that stands alone, ready to answer: merged, quantized, or as it came."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hyperion_core.config import QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan
from hyperion_core.hooks import RunHooks
from hyperion_core.plan import Plan
from hyperion_core.registry import registry

from ..planning_hooks import PlanningHooks
from ..quantization.base import load_quantizable
from ..quantization.existing import reader_of, recognized, saved_quantization
from .cache import cache_dir
from .compiled import compile_generation
from .facts import model_facts
from .hardware import actual_device, choose_dtype
from .load import load_tokenizer, materialize
from .source import resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StandaloneModel:
    """Model and tokenizer; unpacks into (model, tokenizer)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __iter__(self) -> Any:
        return iter((self.model, self.tokenizer))


def load_standalone(model: str | Path, *, dtype: str = "auto", compiled: bool = False) -> StandaloneModel:
    """Load what `hyperion merge` or `hyperion quantize` wrote, or any causal language model, for inference.

    A quantized one is loaded by the plugin that reads its format, also where plain transformers does not know it.

    Args:
        model: a folder, a hub id, a GGUF file, or package://module/file.
        dtype: "float32", "bfloat16" or "float16": of what is not quantized, and what it computes in. "auto" is what
            the quantizer's kernels are fast in, else bfloat16 where the device has it.
        compiled: `model.generate` computes each token after the prompt's by `torch.compile`. The first answer waits for
            that, a minute or more on a CPU.

    Raises:
        ModelError: the model cannot be had, or its files are damaged.
        CompatibilityError: no installed plugin reads how it is quantized, or it cannot be compiled.
        PluginError: the plugin that does is broken.
    """
    device, hooks = actual_device(), RunHooks()
    plan = Plan(config={}, choices=(), device=device, dtype=choose_dtype(dtype, device))
    source = resolve_source(str(model))
    ctx = RunContext(plan=plan, seed=0, device=device, output=Path.cwd(), cache=cache_dir())
    folder = materialize(source, ctx.cache, ctx.log.info)
    config, bits = _quantization(folder, hooks)
    if dtype == "auto" and config is not None and bits is not None:
        plugin = PlanningHooks(hooks).quantizer(str(config.method))
        fast = plugin.quantizer_inference_dtype(config=config, bits=bits, device=device)
        ctx = replace(ctx, plan=replace(plan, dtype=choose_dtype(fast or dtype, device)))
    loaded = load_quantizable(folder, config, hooks, ctx, training=False, bits=bits)
    if compiled:
        compile_generation(loaded)
    return StandaloneModel(loaded.requires_grad_(False).eval(), load_tokenizer(folder))


def _quantization(folder: Path, hooks: RunHooks) -> tuple[QuantizationConfig | None, BitPlan | None]:
    """How the model in `folder` is quantized, and its quantizer among `hooks`; (None, None) where it is not."""
    saved = saved_quantization(folder)
    if saved is None:
        return None, None
    was = str(saved["quant_method"])
    method = reader_of(was)
    if not method:
        raise CompatibilityError(
            f'{folder} is quantized, by "{was}", and no installed quantizer loads that',
            why="how packed weights are read is a plugin's matter",
            fix="install the plugin for it, then see `hyperion plugins list`",
        )
    plugin = registry().create("quantizer", method)
    hooks.add(plugin, method)
    facts = model_facts(resolve_source(str(folder)))
    options, bits = recognized(saved, QuantizationConfig(method=method), PlanningHooks(hooks), facts)
    source = str(folder / "config.json")
    config = cast(QuantizationConfig, plugin.config_class.parse({**options, "method": method}, source=source))
    return config, bits
