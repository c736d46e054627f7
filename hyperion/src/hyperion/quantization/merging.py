"""The adapter's change, added to the weights that forward really used.

On a quantized base that is the dequantized weight, not the one that was there before it was quantized: the adapter was
trained against the rounded one, and has made up for its rounding. Sums are taken in float32, module by module; then
each is rounded once, to the format of the result or to the bits that it had. torch is imported inside functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from hyperion_core.artifact import Artifact
from hyperion_core.config import AdapterConfig, QuantizationConfig
from hyperion_core.context import NoProgress, Progress, RunContext
from hyperion_core.errors import ArtifactError, CompatibilityError, PluginError
from hyperion_core.facts import QuantInfo
from hyperion_core.kinds import Adapter, Quantizer
from hyperion_core.live_facts import live_model_facts
from hyperion_core.plan import Plan
from hyperion_core.registry import registry
from hyperion_core.specs import QuantizerSpecs

from ..models.cache import cache_dir
from ..models.folder import some
from ..models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from ..models.tuned import TunedModel

Target = Literal["float16", "bfloat16", "float32", "quantized"]

_NAME = "default"  # of a run's one adapter, inside the model


def merge(tuned: TunedModel, artifact: Artifact, *, into: Target, progress: Progress | None = None) -> PreTrainedModel:
    """One plain model in place of base and adapter. `tuned` is taken apart: it is of no use afterwards.

    Beside the model that is there, the merged modules alone are held, in the format of the result. Tied weights stay
    tied, unless the adapter changed one of them alone.

    Args:
        tuned: what `load_tuned` gave for `artifact`.
        into: the number format of a plain transformers model, which is left on the CPU; or "quantized": the base's own
            method and bits again.

    Raises:
        CompatibilityError: the adapter cannot be merged, its quantizer cannot dequantize or quantize again, or a weight
            is too large for float16.
        ArtifactError: the merged weights are no numbers, or not what the adapter does.
    """
    refuse_unmergeable(tuned, artifact, into)
    base = _Base.of(tuned, artifact)
    adapter = tuned.hooks.adapter(tuned.adapter)
    device = str(base.model.device.type)
    plan = Plan(config={}, choices=(), device=device, dtype="float32")
    ctx = RunContext(plan=plan, seed=0, device=device, output=artifact.folder, cache=cache_dir())
    attached = adapter.adapter_load(
        model=base.model, name=_NAME, folder=artifact.folder, trainable=False, ctx=ctx
    )  # fmt: skip

    def bare() -> None:
        adapter.adapter_unload(model=attached, name=_NAME)

    merged = _merged(tuned, base, attached, progress)
    return _quantized_again(base, merged, bare) if into == "quantized" else _plain(base, merged, into, bare)


def refuse_unmergeable(tuned: TunedModel, artifact: Artifact, into: Target) -> None:
    """Before anything is computed.

    Raises:
        CompatibilityError: by what they declare, the adapter or the quantizer cannot do it.
    """
    adapter = cast(Adapter, tuned.hooks.plugin("adapter", tuned.adapter))
    if not adapter.capabilities.mergeable:
        raise CompatibilityError(
            f'the adapter "{tuned.adapter}" cannot be merged',
            why="its plugin does not say what a merged module would hold (capabilities.mergeable)",
            fix="keep it apart from the base: load_tuned loads both",
        )
    method = quantizer_of(artifact)
    if method is None:
        if into == "quantized":
            raise CompatibilityError(
                "the base of this adapter is not quantized",
                why='"quantized" means the method and the bits that the adapter was trained on',
                fix="merge into float16, bfloat16 or float32, then quantize that: hyperion quantize",
            )
        return
    quantizer = cast(Quantizer, tuned.hooks.plugin("quantizer", method))
    if not quantizer.provides.dequantize:
        can = _installed(lambda plugin: plugin.provides.dequantize)
        raise CompatibilityError(
            f'nothing can be merged into a base that is quantized by "{method}"',
            why="it does not hand out the weights that it holds (provides.dequantize)",
            fix=f"keep the adapter apart from the base, or train on one that is quantized by: {can}",
        )
    if into == "quantized" and not hasattr(quantizer, "quantizer_requantize"):
        can = _installed(lambda plugin: hasattr(plugin, "quantizer_requantize"))
        raise CompatibilityError(
            f'"{method}" cannot quantize merged modules again',
            why=f"its plugin has no quantizer_requantize; these have: {can}",
            fix="merge into float16, then quantize that: hyperion quantize",
        )


def quantizer_of(artifact: Artifact) -> str | None:
    """The method by which the base was quantized while the adapter was trained."""
    saved = artifact.adapter.get("quantization")
    return str(saved["method"]) if saved else None


def quantization_of(tuned: TunedModel, artifact: Artifact) -> QuantizationConfig | None:
    """Its options."""
    method = quantizer_of(artifact)
    if method is None:
        return None
    config_class = tuned.hooks.plugin("quantizer", method).config_class
    return cast(QuantizationConfig, config_class.parse(artifact.adapter["quantization"]))


@dataclass(frozen=True)
class _Base:
    """The base without its adapter, and its modules by their own names: an adapter that is attached may put others in
    their places. `touched` are those that the adapter may change."""

    model: Any
    modules: Mapping[str, Any]
    touched: frozenset[str]
    embedding: str
    head: str
    tied: bool
    quantized: Mapping[str, QuantInfo]
    quantizer: QuantizerSpecs | None
    config: QuantizationConfig | None

    @classmethod
    def of(cls, tuned: TunedModel, artifact: Artifact) -> _Base:
        adapter = tuned.hooks.adapter(tuned.adapter)
        model: Any = adapter.adapter_unload(model=tuned.model, name=_NAME)
        modules = dict(model.named_modules())
        names = {id(module): name for name, module in modules.items()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        config_class = tuned.hooks.plugin("adapter", tuned.adapter).config_class
        config = cast(AdapterConfig, config_class.parse(artifact.adapter["config"]))
        targets = adapter.adapter_targets(config=config, model=live_model_facts(model))
        # Rows of new tokens are no target, and facts leave out a tied head: the adapter is asked about both ends.
        ends = [names[id(end)] for end in (embedding, head) if id(end) in names]
        method = quantizer_of(artifact)
        quantizer = tuned.hooks.quantizer(method) if method else None
        return cls(
            model=model,
            modules=modules,
            touched=frozenset([*targets, *ends]),
            embedding=names.get(id(embedding), ""),
            head=names.get(id(head), ""),
            tied=head is not None and head.weight is embedding.weight,
            quantized=quantizer.quantizer_modules(model=model) if quantizer else {},
            quantizer=quantizer,
            config=quantization_of(tuned, artifact),
        )

    def weight(self, name: str) -> Tensor:
        """float32 (out, in), as forward uses it."""
        module = self.modules[name]
        if name in self.quantized:
            assert self.quantizer is not None
            return self.quantizer.quantizer_dequantize(module=module)
        weight: Tensor = module.weight.detach().float()
        return weight.T if _is_transposed(module) else weight

    def is_linear(self, name: str) -> bool:
        """It takes vectors, as an embedding does not."""
        module = self.modules[name]
        return name in self.quantized or hasattr(module, "in_features") or _is_transposed(module)

    def bias(self, name: str) -> Tensor | None:
        bias = getattr(self.modules[name], "bias", None)
        return None if bias is None else bias.detach().float()


Merged = Iterator[tuple[str, "Tensor", "Tensor | None"]]


def _merged(tuned: TunedModel, base: _Base, attached: Module, progress: Progress | None) -> Merged:
    """(module, weight, bias) of what is quantized or may be changed: float32, (out, in)."""
    import torch

    from .merged_module import refuse_other_change

    adapter = tuned.hooks.adapter(tuned.adapter)
    wanted = [name for name in base.modules if name in base.touched or name in base.quantized]
    with (progress or NoProgress()).task("merging", len(wanted)) as advance, torch.no_grad():
        for name in wanted:
            used, bias = base.weight(name), base.bias(name)
            weight = used
            if name in base.touched:
                weight, bias = adapter.adapter_merge_weight(
                    model=attached, name=_NAME, module=name, weight=weight, bias=bias
                )
            if weight.shape != used.shape:
                raise CompatibilityError(
                    f"{name} cannot be merged: what the adapter makes of it has another shape",
                    why=f"{tuple(weight.shape)} instead of {tuple(used.shape)}",
                    fix="keep the adapter apart from the base",
                )
            if not torch.isfinite(weight).all():
                raise ArtifactError(
                    f"the merged weight of {name} is not finite",
                    why="the adapter holds inf or nan: its training diverged",
                    fix="train again with a lower learning rate",
                )
            if name in base.touched and base.is_linear(name):
                now = base.model.get_submodule(name)  # with the adapter in it, or over it
                refuse_other_change(name, now, base.model.dtype, (used, base.bias(name)), (weight, bias))
            yield name, weight, bias
            advance(1)


def _plain(base: _Base, merged: Merged, into: str, bare: Callable[[], None]) -> PreTrainedModel:
    """A model of transformers alone, on the CPU, in the format `into`; `bare` takes the adapter off the base."""
    import torch

    dtype = getattr(torch, into)
    empty = _skeleton(base, dtype, tied=base.tied)
    state: dict[str, Tensor] = {}
    for name, weight, bias in merged:
        own = weight.T.contiguous() if _is_transposed(empty.get_submodule(name)) else weight
        state[f"{name}.weight"] = _cast(own, dtype, name).cpu()
        if bias is not None:
            state[f"{name}.bias"] = _cast(bias, dtype, name).cpu()
    bare()
    packed = tuple(f"{name}." for name in base.quantized)
    for key, value in base.model.state_dict().items():
        if key not in state and not key.startswith(packed):
            state[key] = _cast(value, dtype, key).cpu()
    if base.tied and not torch.equal(state[f"{base.embedding}.weight"], state[f"{base.head}.weight"]):
        empty = _skeleton(base, dtype, tied=False)
    elif base.tied:
        state[f"{base.head}.weight"] = state[f"{base.embedding}.weight"]
    missing, unexpected = empty.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise CompatibilityError(
            "the merged weights are not those of the base's architecture",
            why=f"without a value: {some(missing) or 'none'}; without a place: {some(unexpected) or 'none'}",
            fix="keep the adapter apart from the base",
        )
    if empty.config.get_text_config().tie_word_embeddings:
        empty.tie_weights()
    empty.generation_config = copy.deepcopy(base.model.generation_config)
    return cast("PreTrainedModel", empty.eval().requires_grad_(False))


def _skeleton(base: _Base, dtype: torch.dtype, *, tied: bool) -> Any:
    """The base's architecture without its quantization; parameters have no values yet, constants have."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    values = base.model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    config = type(base.model.config).from_dict(values)
    if base.tied and not tied:
        _untie(config)
    with init_empty_weights(include_buffers=False), quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _quantized_again(base: _Base, merged: Merged, bare: Callable[[], None]) -> PreTrainedModel:
    """The base itself, with new modules of the same bits, and with what else the adapter changed."""
    import torch

    assert base.quantizer is not None and base.config is not None
    packed: dict[str, Any] = {}
    changed: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, weight, bias in merged:
        own = base.modules[name]
        held = None if bias is None else _cast(bias, own.bias.dtype if own.bias is not None else own.weight.dtype, name)
        if name not in base.quantized:
            turned = weight.T.contiguous() if _is_transposed(own) else weight
            changed[name] = _cast(turned, own.weight.dtype, name), held
            continue
        packed[name] = base.quantizer.quantizer_requantize(
            module=own, weight=weight, config=base.config, bits=base.quantized[name].bits
        )
        if held is not None:
            packed[name].bias = torch.nn.Parameter(held, requires_grad=False)
    bare()
    if base.tied and torch.equal(changed[base.embedding][0], changed[base.head][0]):
        changed.pop(base.head)
    elif base.tied:
        _untie(base.model.config)
        base.modules[base.head].weight = torch.nn.Parameter(changed[base.head][0], requires_grad=False)
    for name, new in packed.items():
        base.model.set_submodule(name, new)
    for name, (weight, held) in changed.items():
        base.modules[name].weight.data = weight
        if held is not None:
            base.modules[name].bias.data = held
    now = base.quantizer.quantizer_modules(model=base.model)
    if other := [name for name, info in base.quantized.items() if name not in now or now[name].bits != info.bits]:
        raise CompatibilityError(
            "quantized again, the base has other bits than before",
            why=f"the fault is the quantizer's: its quantizer_requantize changed {some(other)}",
            fix="merge into float16, and tell the plugin's author",
        )
    return cast("PreTrainedModel", base.model.eval())


def _untie(config: Any) -> None:
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False


def _is_transposed(module: Any) -> bool:
    """transformers' Conv1D holds its weight as (in, out)."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rounded once; on the device that it was on.

    Raises:
        CompatibilityError: it is too large for float16.
    """
    import torch

    if not value.is_floating_point() or value.dtype == dtype:
        return value.detach()
    rounded = value.detach().to(dtype)
    if torch.isinf(rounded).any() and not torch.isinf(value).any():
        raise CompatibilityError(
            f"{name} cannot be held in {str(dtype).removeprefix('torch.')}",
            why=f"its largest value is {value.abs().max().item():.6g}, and that format ends at "
            f"{torch.finfo(dtype).max:g}",
            fix="merge into bfloat16 or float32: --into bfloat16",
        )
    return rounded


def _installed(fitting: Callable[[type[Quantizer]], bool]) -> str:
    """Names of the installed quantizers that fit, for an error."""
    names = []
    for entry in registry().entries("quantizer"):
        with suppress(PluginError):
            plugin = registry().load("quantizer", entry.qualified)
            if issubclass(plugin, Quantizer) and fitting(plugin):
                names.append(entry.name)
    return ", ".join(sorted(set(names))) or "none that is installed"
