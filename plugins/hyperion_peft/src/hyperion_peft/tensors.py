"""The tensors of one adapter inside a PEFT model, found by structure. Loaded only with torch.

By structure and not by name: peft's own filter takes every key that contains ".name." for that adapter's, so that an
adapter called "layers" would own the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

# peft keeps these in a module of their own, and leaves ".weight" out of the file, as older versions wrote it.
_WITHOUT_WEIGHT = frozenset({"lora_magnitude_vector"})
# torch's name for what a parametrized tensor is made from.
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original")


@dataclass(frozen=True)
class AdapterTensor:
    """`key` is its name in a PEFT file, `name` the parameter's in the model.

    Where the adapter computes with something else that is made from the parameter (torch.nn.utils.parametrize), `owner`
    is the module that makes it, and `key` is that one's name.
    """

    key: str
    name: str
    parameter: nn.Parameter
    owner: nn.Module | None = None

    def value(self) -> Tensor:
        """What the adapter computes with."""
        return self.parameter if self.owner is None else getattr(self.owner, self.key.rpartition(".")[2])


def adapter_tensors(model: nn.Module, adapter: str) -> list[AdapterTensor]:
    """Every tensor that `adapter` owns in a PeftModel, once, in the order of the model's modules."""
    found: list[AdapterTensor] = []
    wrappers: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(wrapper) for wrapper in wrappers):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(f"{path}.")
            found += _of_wrapper(path, module, adapter)
        elif isinstance(module, BaseTunerLayer):
            found += _of_layer(path, module, adapter)
    return found


def base_biases(model: nn.Module, adapter: str, which: str) -> list[AdapterTensor]:
    """The base's own biases that LoRA trains with `bias: all` or `bias: lora_only`."""
    if which == "none":
        return []
    targeted = {path for path, module in tuner_layers(model) if adapter in adapters_of(module)}
    inside = [f"{path}." for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    own = [f"{path}." for path, _ in tuner_layers(model)]
    found = []
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] != "bias" or any(name.startswith(path) for path in inside):
            continue
        layer = next((path[:-1] for path in own if name.startswith(path)), None)
        if layer is not None and name != f"{layer}.base_layer.bias":
            continue  # an adapter's own bias
        if which == "all" or layer in targeted:
            found.append(AdapterTensor(name, name, parameter))
    return found


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """(path, layer) of what an adapter has put around modules of the base, wrappers left out."""
    wrappers: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(wrapper) for wrapper in wrappers):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(f"{path}.")
        elif isinstance(module, BaseTunerLayer):
            yield path, module


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that have tensors in `layer`."""
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)}


def _of_layer(path: str, layer: BaseTunerLayer, adapter: str) -> Iterator[AdapterTensor]:
    for attribute in dict.fromkeys(layer.adapter_layer_names):  # DoRA names its own a second time
        container = getattr(layer, attribute)
        if adapter not in container:
            continue
        entry, at = container[adapter], f"{path}.{attribute}"
        if isinstance(entry, nn.Parameter):
            yield AdapterTensor(at, f"{at}.{adapter}", entry)
        elif isinstance(entry, nn.Module):
            for name, parameter in entry.named_parameters():
                made = _PARAMETRIZED.fullmatch(name)
                own = made[1] if made else name
                key = at if attribute in _WITHOUT_WEIGHT and own == "weight" else f"{at}.{own}"
                yield AdapterTensor(key, f"{at}.{adapter}.{name}", parameter, entry if made else None)


def _of_wrapper(path: str, wrapper: AuxiliaryTrainingWrapper, adapter: str) -> Iterator[AdapterTensor]:
    if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
        for name, parameter in wrapper.modules_to_save[adapter].named_parameters():
            yield AdapterTensor(f"{path}.{name}", f"{path}.modules_to_save.{adapter}.{name}", parameter)
    elif isinstance(wrapper, TrainableTokensWrapper) and not wrapper.token_adapter.tied_adapter:
        rows = wrapper.token_adapter.trainable_tokens_delta
        if adapter in rows:
            at = f"{path}.token_adapter.trainable_tokens_delta"
            yield AdapterTensor(at, f"{at}.{adapter}", rows[adapter])
