"""How transformers loads a base through bitsandbytes, and what is done with the model then. Imports torch.

Each weight is quantized as it is read, so a base never lies in memory in full precision. transformers'
`BitsAndBytesConfig` has no block size, so a loader of ours stands in for its own: it adds that to the modules, and
names the modules that stay. What is saved says plain "bitsandbytes", and plain transformers loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import BitPlan, ModelFacts, is_output_head
from hyperion_core.live_facts import live_model_facts
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from .chosen import chosen_modules, widths
from .config import BnbConfig
from .linear import bnb, exact, share_maps

Chosen = Mapping[str, tuple[int, int]]
"""(bits, block size) by module name; block size 0 with 8 bits."""


class _OurModules(HfQuantizer):
    """Before one of transformers' own loaders: quantizes the modules of the plan, in blocks of its size."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        self.choose: Callable[[ModelFacts], Chosen] = quantization_config.__dict__.pop("choose")
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        chosen = self.choose(live_model_facts(model))
        self.quantization_config.llm_int8_skip_modules = [
            name
            for name, module in model.named_modules()
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and name not in chosen
        ]
        super()._process_model_before_weight_loading(model, **kwargs)
        for name, (width, block) in chosen.items():
            if width == 4:
                model.get_submodule(name).weight.blocksize = block


class FourBitLoader(_OurModules, Bnb4BitHfQuantizer):
    pass


class EightBitLoader(_OurModules, Bnb8BitHfQuantizer):
    pass


_LOADERS = {4: ("hyperion_bnb_4bit", FourBitLoader), 8: ("hyperion_bnb_8bit", EightBitLoader)}


def load_kwargs(source: Path, config: BnbConfig, bits: BitPlan, ctx: RunContext) -> dict[str, Any]:
    """For `from_pretrained`; of a base that is quantized already, its config.json says the rest."""
    placed = {"device_map": {"": ctx.device}}
    if json.loads((source / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        return placed
    (width,) = widths(bits)
    given: dict[str, Any] = {"load_in_8bit": True}
    if width == 4:
        given = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.type_in_force,
            "bnb_4bit_use_double_quant": config.double_quant_in_force,
            "bnb_4bit_compute_dtype": ctx.plan.dtype if config.compute_dtype == "auto" else config.compute_dtype,
        }
    told = BitsAndBytesConfig(**given)
    told.choose = lambda facts: chosen_modules(facts, config, bits)
    told.quant_method, AUTO_QUANTIZER_MAPPING[told.quant_method] = _LOADERS[width]
    return {**placed, "quantization_config": told}


def after_load(model: Any, config: BnbConfig, planned: Chosen) -> Any:
    """Frozen, verified, and computing exactly.

    Raises:
        CompatibilityError: it is quantized otherwise than planned.
    """
    ready = model.hf_quantizer.pre_quantized if hasattr(model, "hf_quantizer") else True
    found = {name: module for name, module in model.named_modules() if is_quantized(module)}
    _verify(found, config, planned, any_block=ready and config.group_size is None)
    saved: Any = getattr(model.config, "quantization_config", None)
    kept = model.get_input_embeddings().weight.dtype
    for module in found.values():
        if isinstance(module, bnb.nn.Linear4bit):
            if config.compute_dtype != "auto":
                saved.bnb_4bit_compute_dtype = getattr(torch, config.compute_dtype)
            exact(module, saved.bnb_4bit_compute_dtype)
        else:
            exact(module, kept)
    blocks = {module.weight.quant_state.blocksize for module in found.values() if isinstance(module, bnb.nn.Linear4bit)}
    if len(blocks) == 1:  # transformers has no such key, and passes over it
        (saved.bnb_4bit_blocksize,) = blocks
    share_maps(list(found.values()))
    return model.requires_grad_(False)


def is_quantized(module: Any) -> bool:
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def _verify(found: Mapping[str, Any], config: BnbConfig, planned: Chosen, *, any_block: bool) -> None:
    if heads := [name for name in found if is_output_head(name)]:
        raise CompatibilityError(
            f"the output head of this base, {heads[0]}, is quantized too",
            why="Hyperion leaves it as it is, and cannot train over one in fewer bits",
            fix="start from a checkpoint that keeps it, or from the unquantized model",
        )
    for name in [*planned, *found]:
        is_there = _described(found[name], any_block) if name in found else "not quantized"
        wanted = _wanted(*planned[name], config, any_block) if name in planned else "not quantized"
        if is_there != wanted:
            raise CompatibilityError(
                "the base is quantized otherwise than planned",
                why=f"{name} is {is_there}, and the plan says {wanted}",
                fix="ask for what it has, start from the unquantized model, or name what stays in skip_modules",
            )


def _described(module: Any, any_block: bool) -> str:
    if isinstance(module, bnb.nn.Linear8bitLt):
        return "in 8 bits"
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return "meant for 4 bits, without the scales that belong to them"
    return _words(state.quant_type, state.blocksize, state.nested, any_block)


def _wanted(width: int, block: int, config: BnbConfig, any_block: bool) -> str:
    if width == 8:
        return "in 8 bits"
    return _words(config.type_in_force, block, config.double_quant_in_force, any_block)


def _words(quant_type: str, block: int, nested: bool, any_block: bool) -> str:
    size = "" if any_block else f" in blocks of {block}"
    return f"{quant_type}{size} with {'quantized' if nested else 'unquantized'} scales"
