"""Attach, activate and detach adapters in a live model. Loaded only with torch."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import ModelFacts
from hyperion_core.live_facts import live_model_facts
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .beside_gptqmodel import without_gptqmodel
from .fast_linear import speed_up
from .tensors import AdapterTensor, adapter_tensors, base_biases, tuner_layers

_STATE = "_hyperion_peft_state"
_LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass
class BaseState:
    """What the base was before the first adapter, so that it can be given back.

    `active` are the adapters in force and their weights. `bias_owner` trains biases of the base itself: while it is
    not in force they hold `base_biases`, and its own values wait in `tuned_biases`.
    """

    trainable: set[str]
    active: dict[str, float] = field(default_factory=dict)
    bias_owner: str | None = None
    base_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    tuned_biases: dict[str, torch.Tensor] = field(default_factory=dict)


def attach(model: nn.Module, name: str, config: PeftConfig, seed: int) -> PeftModel:
    """Put an adapter into the model: it alone trains and is in force. fp32 whatever the base is.

    The initialisation depends on `seed` alone, and the caller's random state stays as it was.

    Raises:
        CompatibilityError: the name is taken or cannot be one, another method is in the model, or PEFT refuses.
    """
    _check_name(model, name)
    first = not isinstance(model, PeftModel)
    if not first and cast(PeftModel, model).peft_type != config.peft_type:
        raise CompatibilityError(
            f'the adapter "{name}" ({_method(config)}) cannot join {_listed(cast(PeftModel, model))}',
            why="PEFT holds adapters of one method in a model at a time",
            fix="unload the others first, or use adapters of one method",
        )
    state = BaseState({n for n, p in model.named_parameters() if p.requires_grad}) if first else state_of(model)
    bias = getattr(config, "bias", "none")
    if bias != "none" and state.bias_owner is not None:
        raise CompatibilityError(
            f'the adapter "{name}" cannot train biases: "{state.bias_owner}" does already',
            why="biases belong to the base, and there is one set of them",
            fix='set bias: "none"',
        )
    with _seeded(seed), _quiet(), without_gptqmodel():
        try:
            if first:
                model = PeftModelForCausalLM(model, config, adapter_name=name)
                setattr(model, _STATE, state)
            else:
                cast(PeftModel, model).add_adapter(name, config)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
            _roll_back(model, name, state, first)
            raise CompatibilityError(
                f'PEFT refuses the adapter "{name}" on {type(model).__name__}',
                why=str(error),
                fix="change the adapter's options accordingly",
            ) from error
    peft_model = cast(PeftModel, model)
    _copies_in_fp32(peft_model, name)
    speed_up(peft_model)
    if bias != "none":
        state.bias_owner = name
        found = base_biases(peft_model, name, bias)
        state.base_biases = {tensor.name: tensor.parameter.detach().clone() for tensor in found}
        state.tuned_biases = dict(state.base_biases)
    activate(peft_model, {name: 1.0}, scales=False)
    train_only(peft_model, name)
    return peft_model


def declared(model: nn.Module, name: str) -> list[AdapterTensor]:
    """Every tensor that belongs to `name`: its own, and the biases of the base that it trains."""
    config = adapter_config(model, name)
    return adapter_tensors(model, name) + base_biases(model, name, getattr(config, "bias", "none"))


def train_only(model: nn.Module, name: str | None) -> None:
    """Make the tensors of `name` the only trainable ones; None freezes everything."""
    model.requires_grad_(False)
    for tensor in declared(model, name) if name is not None else ():
        tensor.parameter.requires_grad_(True)


def activate(model: nn.Module, weights: Mapping[str, float], *, scales: bool) -> None:
    """Put exactly these adapters in force. What trains stays as it was.

    Args:
        scales: whether the method can act more or less strongly than 1.

    Raises:
        CompatibilityError: an unknown name, or a strength that the method or the adapter does not have.
    """
    if not isinstance(model, PeftModel):
        if weights:
            raise _no_adapter(model, next(iter(weights)))
        return
    for name, weight in weights.items():
        _check_weight(model, name, weight, scales)
    state = state_of(model)
    with _trainability_kept(model):
        if weights:
            model.base_model.enable_adapter_layers()
            model._adapters_disabled = False
            try:
                model.base_model.set_adapter(list(weights))
            except ValueError as error:
                raise CompatibilityError(
                    f"the adapters {', '.join(weights)} cannot act together", why=str(error), fix="activate one of them"
                ) from error
            # The outer model looks its config up by one name, even where several are in force.
            model.active_adapter = next(iter(weights))
            for _, layer in tuner_layers(model):
                for name, weight in weights.items():
                    if hasattr(layer, "set_scale"):
                        layer.set_scale(name, weight)
        else:
            with _quiet():
                model.base_model.disable_adapter_layers()
            model._adapters_disabled = True
    state.active = dict(weights)
    _hold_biases(model, state, tuned=state.bias_owner in weights)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the base alone acts."""
    before = dict(state_of(model).active) if isinstance(model, PeftModel) else {}
    activate(model, {}, scales=True)
    try:
        yield
    finally:
        activate(model, before, scales=True)


def detach(model: nn.Module, name: str) -> nn.Module:
    """Take `name` out. With the last one goes everything that PEFT put into the base."""
    adapter_config(model, name)
    peft_model, state = cast(PeftModel, model), state_of(model)
    _hold_biases(peft_model, state, tuned=False)
    if state.bias_owner == name:
        state.bias_owner, state.base_biases, state.tuned_biases = None, {}, {}
    others = [other for other in peft_model.peft_config if other != name]
    if not others:
        return _bare(peft_model.get_base_model(), state)
    left = {other: weight for other, weight in state.active.items() if other != name}
    trained = {id(p) for p in peft_model.parameters() if p.requires_grad}
    # peft picks a successor for an adapter that is deleted while in force, and switches training on for it.
    activate(peft_model, {others[0]: 1.0}, scales=False)
    with _quiet():
        peft_model.delete_adapter(name)
    for parameter in peft_model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    activate(peft_model, left, scales=True)
    return peft_model


def adapter_config(model: nn.Module, name: str) -> PeftConfig:
    """The PEFT config of an attached adapter.

    Raises:
        CompatibilityError: no adapter of that name is in the model.
    """
    if not isinstance(model, PeftModel) or name not in model.peft_config:
        raise _no_adapter(model, name)
    return model.peft_config[name]


def state_of(model: nn.Module) -> BaseState:
    """The state of a model with adapters; made now for one that plain peft has wrapped."""
    state = getattr(model, _STATE, None)
    if not isinstance(state, BaseState):
        peft_model = cast(PeftModel, model)
        state = BaseState(set(), dict.fromkeys(peft_model.active_adapters, 1.0))
        setattr(model, _STATE, state)
    return state


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside, adapters and all."""
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def facts_of(model: nn.Module) -> ModelFacts:
    """Facts of the base, with or without adapters in it."""
    return live_model_facts(base_of(model), unwrap=_original)


def _original(module: nn.Module) -> nn.Module:
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
        module = cast(nn.Module, inner)
    return module


def _bare(base: nn.Module, state: BaseState) -> nn.Module:
    """Put every original module back in its place."""
    for path, module in list(base.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            parent, _, child = path.rpartition(".")
            owner = base.get_submodule(parent)
            if getattr(owner, child, None) is module:  # else it lay inside one that has just been replaced
                setattr(owner, child, _original(module))
    if hasattr(base, "peft_config"):
        del base.peft_config
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in state.trainable)
    return base


def _roll_back(model: nn.Module, name: str, state: BaseState, first: bool) -> None:
    if first:
        _bare(model, state)
        return
    base = base_of(model)
    for module in base.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            with _quiet():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.delete_adapter(name, None) if name in module._adapters else None
                else:
                    module.delete_adapter(name)
    activate(model, dict(state.active), scales=True)


def _hold_biases(model: nn.Module, state: BaseState, *, tuned: bool) -> None:
    """Let the base's biases hold the owner's values, or their own."""
    if state.bias_owner is None:
        return
    parameters = dict(model.named_parameters())
    holds_tuned = not state.tuned_biases
    if tuned and not holds_tuned:
        _copy(state.tuned_biases, parameters)
        state.tuned_biases = {}
    elif not tuned and holds_tuned:
        state.tuned_biases = {name: parameters[name].detach().clone() for name in state.base_biases}
        _copy(state.base_biases, parameters)


def _copy(values: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _copies_in_fp32(model: nn.Module, name: str) -> None:
    """Train copies of whole modules in fp32 over a half-precision base, and let them speak its type."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            copy = module.modules_to_save[name]
            kept = next((p.dtype for p in copy.parameters() if p.dtype in _LOW_PRECISION), None)
            if kept is not None:
                copy.float()
                copy.register_forward_pre_hook(_inputs_to_fp32)
                copy.register_forward_hook(functools.partial(_output_to, kept))


def _inputs_to_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _output_to(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise CompatibilityError(
            f"an adapter cannot be called {name!r}",
            why="torch keeps adapters by name, and a dot or the name of a method of its own would break that",
            fix='call it "default", for example',
        )
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise CompatibilityError(
            f'the model has an adapter called "{name}" already',
            why="an adapter is known by its name",
            fix="choose another name, or unload that one first",
        )


def _check_weight(model: nn.Module, name: str, weight: float, scales: bool) -> None:
    config = adapter_config(model, name)
    if not math.isfinite(weight):
        raise CompatibilityError(f'"{name}" cannot act with strength {weight}', fix="give a finite number")
    if weight == 1.0:
        return
    why = ""
    if not scales:
        why = f"{_method(config)} multiplies what flows through the base, and has no strength"
    elif getattr(config, "use_dora", False):
        why = "DoRA changes the direction of weights, which has no strength"
    elif any(_is_copy(tensor) for tensor in declared(model, name)):
        why = "it holds whole modules, token rows or biases, which replace the base's and have no strength"
    if why:
        raise CompatibilityError(f'"{name}" cannot act with strength {weight}', why=why, fix="activate it with 1.0")


def _is_copy(tensor: AdapterTensor) -> bool:
    return ".modules_to_save." in tensor.name or ".token_adapter." in tensor.name or tensor.name == tensor.key


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _listed(model: PeftModel) -> str:
    return ", ".join(f'"{name}" ({_method(config)})' for name, config in model.peft_config.items())


def _no_adapter(model: nn.Module, name: str) -> CompatibilityError:
    there = _listed(model) if isinstance(model, PeftModel) else "none"
    return CompatibilityError(
        f'the model has no adapter called "{name}"', why=f"in it: {there}", fix="name one of these"
    )


@contextmanager
def _trainability_kept(model: nn.Module) -> Iterator[None]:
    """peft switches gradients on and off as it activates; who trains is decided elsewhere."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Adapters are made on the CPU and moved: its generator is the only one that matters.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's advice on what is taken care of here."""
    with warnings.catch_warnings():
        for message in ("Adapter name", "Adapter .* was active", "Careful, disabling", "Model .*tie_word_embeddings",
                        "Model has `tie_word_embeddings", "fan_in_fan_out is set",
                        "`is_gradient_checkpointing` is deprecated"):  # fmt: skip
            warnings.filterwarnings("ignore", message=message)
        yield
