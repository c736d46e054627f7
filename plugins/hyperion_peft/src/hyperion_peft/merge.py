"""What a merged module would hold, by peft's own merge on a module made for the purpose. Loaded only with torch."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from hyperion_core.errors import CompatibilityError
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .attach import adapter_config, base_of, state_of
from .beside_gptqmodel import without_gptqmodel

ONLY = "only"  # the name of the one module in the model that a merge is made on


def merged(
    model: nn.Module, name: str, module: str, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `module` with the adapter in it; neither the model nor the arguments change.

    Args:
        options: how peft is to treat the module (rank, feed-forward or not), beside the adapter's own config.

    Raises:
        CompatibilityError: no such module, or it has no place for what the adapter adds.
    """
    config = adapter_config(model, name)
    try:
        found = base_of(model).get_submodule(module)
    except AttributeError as error:
        raise CompatibilityError(
            f"the base has no module {module}", why=str(error), fix="name a module of the base"
        ) from error
    trained = _trained_copy(model, name, module)
    if trained is not None:
        own = getattr(trained, "bias", None)
        return _fp32(cast(Tensor, trained.weight)), None if own is None else _fp32(own)
    if isinstance(found, TrainableTokensWrapper) and name in found.token_adapter.trainable_tokens_delta:
        rows = torch.tensor(found.token_adapter.token_indices[name], device=weight.device)
        values = found.token_adapter.trainable_tokens_delta[name]
        return _fp32(weight).index_copy(0, rows, _fp32(values).to(weight.device)), _kept(bias)
    if not isinstance(found, BaseTunerLayer) or not _has(found, name):
        return _fp32(weight), _kept(bias)
    if getattr(config, "bias", "none") != "none":
        bias = _trained_bias(model, name, module, bias)
    return _by_peft(found, name, config, weight, bias, options)


def _trained_copy(model: nn.Module, name: str, module: str) -> nn.Module | None:
    """The copy of `module` that is trained in full, alone or within a copy of what contains it."""
    within, rest = base_of(model), module.split(".")
    while rest:
        within = within.get_submodule(rest.pop(0))
        if isinstance(within, ModulesToSaveWrapper):
            if name not in within.modules_to_save:
                return None
            return within.modules_to_save[name].get_submodule(".".join(rest))
        if isinstance(within, BaseTunerLayer):
            return None
    return None


def _by_peft(
    layer: BaseTunerLayer, name: str, config: PeftConfig, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    holder = nn.Module()
    holder.add_module(ONLY, _plain(layer.get_base_layer(), weight, bias))
    own = copy.deepcopy(config)
    for key, value in {"target_modules": [ONLY], "exclude_modules": None, "modules_to_save": None, **options}.items():
        setattr(own, key, value)
    with without_gptqmodel():
        holder = inject_adapter_in_model(own, holder, adapter_name=name)
    merging = cast(Any, holder.get_submodule(ONLY))
    with torch.no_grad():
        for attribute in layer.adapter_layer_names:
            source, target = getattr(layer, attribute), getattr(merging, attribute)
            if name not in source:
                continue
            if isinstance(source[name], nn.Parameter):
                target[name] = nn.Parameter(_fp32(source[name]))
            else:
                wanted = target[name].state_dict()
                target[name].load_state_dict({key: _fp32(getattr(source[name], key)) for key in wanted})
    merging.to(weight.device)
    try:
        merging.merge(safe_merge=True, adapter_names=[name])
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise CompatibilityError(
            f'"{name}" cannot be merged into this module', why=str(error), fix="keep the adapter apart from the base"
        ) from error
    base = merging.get_base_layer()
    return base.weight.detach(), None if getattr(base, "bias", None) is None else base.bias.detach()


def _plain(original: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """An fp32 module of the same sizes; quantized and transposed ones become ordinary linear ones."""
    rows, width = weight.shape
    with torch.device("meta"):
        made: nn.Module = (
            nn.Embedding(rows, width)
            if isinstance(original, nn.Embedding)
            else nn.Linear(width, rows, bias=bias is not None)
        )
    made.weight = nn.Parameter(_fp32(weight))
    if bias is not None:
        made.bias = nn.Parameter(_fp32(bias))
    return made


def _trained_bias(model: nn.Module, name: str, module: str, bias: Tensor | None) -> Tensor | None:
    state = state_of(model)
    outside = [bias for bias in state.base_biases if not bias.endswith(".base_layer.bias")]
    if outside:
        raise CompatibilityError(
            f'"{name}" cannot be merged module by module',
            why=f"it trains biases of modules that it does not wrap: {outside[0].removeprefix('base_model.model.')}, …",
            fix='train with bias: "lora_only", or keep the adapter apart',
        )
    own = f"base_model.model.{module}.base_layer.bias"
    if bias is None or own not in state.base_biases:
        return bias
    tuned = state.tuned_biases.get(own)
    return tuned if tuned is not None else dict(model.named_parameters())[own].detach()


def _has(layer: BaseTunerLayer, name: str) -> bool:
    return any(name in getattr(layer, attribute) for attribute in layer.adapter_layer_names)


def _fp32(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32, copy=True)


def _kept(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _fp32(bias)
