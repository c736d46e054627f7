"""Rounds weights to the nearest of 2^bits steps, group by group: W ≈ (q - zero) · scale, where q are small integers.

Written on Hyperion's contract alone. Change the mathematics in `_quantize` and `_dequantize`; the hooks then mostly
stay as they are. It needs no calibration data, and quantizes a model once its weights are loaded.

torch and transformers are imported inside the functions that need them, so that planning a run stays fast.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperion_core.config import QuantizationConfig
from hyperion_core.errors import CompatibilityError, Problem
from hyperion_core.facts import BitPlan, Cost, ModelFacts, ModuleFact, Provides, QuantInfo
from hyperion_core.kinds import Quantizer
from pydantic import Field

__all__ = ["ChangemeConfig", "ChangemeQuantizer"]

GROUP = 32  # weights that share a scale, where the user does not say
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ChangemeConfig(QuantizationConfig):
    """What a user may write below `quantization:`. Unknown keys are refused with a suggestion."""

    method: str = "changeme"
    symmetric: bool = Field(False, description="Steps on both sides of 0 alike: no zero points, a little less exact.")

    understood = frozenset({"group_size"})  # of the two keys that not every method has a notion of; not double_quant


class ChangemeQuantizer(Quantizer):
    """Quantizes every linear module but the output head."""

    config_class = ChangemeConfig
    provides = Provides(
        bits=frozenset({2, 3, 4, 8}),
        per_module=True,
        trainable=True,
        devices=frozenset({"cpu", "cuda"}),
        dequantize=True,
        reads=frozenset({"changeme"}),
    )

    # --- planning: no torch here ---

    def quantizer_check(self, config: ChangemeConfig, model: ModelFacts, bits: BitPlan, device: str) -> list[Problem]:
        problems = []
        chosen = [(bits.bits, bits.group_size), *bits.overrides.values()]
        for wrong in sorted({width for width, _ in chosen} - self.provides.bits - {16}):
            offered = ", ".join(map(str, sorted(self.provides.bits)))
            why, fix = "it packs other widths", f"take one of {offered}"
            problems.append(Problem("bits", f"changeme cannot hold weights in {wrong} bits", why, fix))
        if device not in self.provides.devices:
            offered = " or ".join(sorted(self.provides.devices))
            problems.append(Problem("", f'changeme does not work on "{device}"', fix=f"train on {offered}"))
        misfits = [m for m, width, group in _chosen(model, bits) if m.shape[1] % group or m.shape[1] % 8]
        if misfits:
            widths = ", ".join(sorted({str(module.shape[1]) for module in misfits}))
            why = f"{misfits[0].name} and {len(misfits) - 1} more have inputs of width {widths}"
            fix = "choose one that divides them; the widths themselves must be multiples of 8"
            problems.append(Problem("group_size", "the groups do not divide some layers", why, fix))
        return problems

    def quantizer_estimate(self, config: ChangemeConfig, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
        total = model.parameters * DTYPE_BYTES[dtype]
        for module, width, group in _chosen(model, bits):
            rows, columns = module.shape
            per_group = 2 if config.symmetric else 3  # the scale in float16, and the zero point
            held = rows * columns * width // 8 + rows * columns // group * per_group
            total += held - rows * columns * DTYPE_BYTES[dtype]
        return Cost({"weights": total}, disk=total)

    # --- loading ---

    def quantizer_recognize(self, saved: Mapping[str, Any]) -> tuple[dict[str, Any], BitPlan]:
        modules = {name: (bits, group) for name, (bits, group) in saved["modules"].items()}
        options: dict[str, Any] = {"symmetric": saved["symmetric"]}
        if len(set(modules.values())) == 1:  # all alike
            options["bits"], options["group_size"] = next(iter(modules.values()))
        return options, BitPlan(16, 0, modules)

    def quantizer_load_kwargs(self) -> dict[str, Any]:
        _register_with_transformers()  # for a model that `quantizer_save` wrote
        return {}

    def quantizer_after_load(self, model: Any, config: ChangemeConfig, bits: BitPlan, training: bool) -> Any:
        from hyperion_core.live_facts import live_model_facts

        planned = {module.name: (width, group) for module, width, group in _chosen(live_model_facts(model), bits)}
        if not self.quantizer_modules(model):
            for name, (width, group) in planned.items():
                linear = model.get_submodule(name)
                packed = _empty_like(linear, width, group, config.symmetric)
                packed.hold(linear.weight.detach())
                model.set_submodule(name, packed)
        found = {name: (info.bits, info.group_size) for name, info in self.quantizer_modules(model).items()}
        if found != planned:
            name = next(name for name in [*planned, *found] if planned.get(name) != found.get(name))
            raise CompatibilityError(
                "the base is quantized otherwise than planned",
                why=f"{name} has (bits, group size) {found.get(name)}, and the plan says {planned.get(name)}",
                fix="ask for the bits and the group size that it has, or start from the unquantized model",
            )
        model.config.quantization_config = {
            "quant_method": "changeme",
            "symmetric": config.symmetric,
            "modules": {name: list(pair) for name, pair in found.items()},
        }
        return model.requires_grad_(False)

    def quantizer_modules(self, model: Any) -> Mapping[str, QuantInfo]:
        packed = {name: module for name, module in model.named_modules() if isinstance(module, _packed_linear())}
        return {
            name: QuantInfo(m.bits, m.group_size, sum(t.nbytes for t in [*m.parameters(), *m.buffers()]))
            for name, m in packed.items()
        }

    # --- the weights themselves ---

    def quantizer_fake_quantize(self, weight: Any, config: ChangemeConfig, bits: int, group_size: int) -> Any:
        parts = _quantize(weight.float(), bits, group_size or GROUP, config.symmetric)
        return _dequantize(*parts).to(weight.dtype)

    def quantizer_dequantize(self, module: Any) -> Any:
        return module.unpacked()

    def quantizer_requantize(self, module: Any, weight: Any, config: ChangemeConfig, bits: int) -> Any:
        packed = _empty_like(module, bits, module.group_size, config.symmetric)
        packed.hold(weight)
        return packed

    def quantizer_save(self, model: Any, config: ChangemeConfig, folder: Path) -> list[Path]:
        before = set(folder.iterdir())
        model.save_pretrained(folder)
        return sorted(set(folder.iterdir()) - before)


def _chosen(model: ModelFacts, bits: BitPlan) -> list[tuple[ModuleFact, int, int]]:
    """(module, bits, group size) of what is to be quantized; 16 bits leave a module as it is."""
    found = [(module, *bits.of(module.name)) for module in model.linear()]
    return [(module, width, group or GROUP) for module, width, group in found if width != 16]


def _quantize(weight: Any, bits: int, group_size: int, symmetric: bool) -> tuple[Any, Any, Any]:
    """weight: (out, in) float32. Gives q, integers (out, groups, group_size), and scale and zero, (out, groups, 1)."""
    import torch

    groups, steps = weight.unflatten(1, (-1, group_size)), 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / (steps // 2)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:  # 0 itself is always a step
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / steps
        zero = -low / scale.clamp(min=2**-24)
    scale = scale.clamp(min=2**-24).half()  # what is kept, and so what must be divided by; 2^-24 is its least value
    zero = zero.round().clamp(0, steps)
    return (groups / scale.float() + zero).round().clamp(0, steps).to(torch.uint8), scale, zero.to(torch.uint8)


def _dequantize(q: Any, scale: Any, zero: Any) -> Any:
    """The inverse, as far as there is one: (out, in) float32."""
    return ((q.float() - zero.float()) * scale.float()).flatten(1)


@functools.cache
def _packed_linear() -> Any:
    """The class of quantized modules. It is made on first use: torch is not imported before."""
    import torch
    from hyperion_core.unpacked_weight import unpacked_weight

    class Product(torch.autograd.Function):
        """x · Wᵀ. Autograd alone would keep every W whole until the way back; here it is unpacked again instead."""

        @staticmethod
        def forward(ctx: Any, x: Any, module: Any) -> Any:
            ctx.module = module
            return x @ module.unpacked().to(x.dtype).T

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient @ ctx.module.unpacked().to(gradient.dtype), None

    class PackedLinear(torch.nn.Linear):  # PEFT and others ask for torch.nn.Linear
        def __init__(self, shape: tuple[int, int], bias: Any, bits: int, group_size: int, symmetric: bool) -> None:
            torch.nn.Module.__init__(self)  # Linear's own would make a weight in full precision
            self.out_features, self.in_features = shape
            self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
            self.bias = bias
            groups = (self.out_features, self.in_features // group_size, 1)
            # One bit of eight weights a byte, so that 3 bits take 3 bits. The scales are float16 kept as integers:
            # nothing that casts a model to another type can round them.
            packed = torch.empty(bits, self.out_features, self.in_features // 8, dtype=torch.uint8)
            self.register_buffer("packed", packed)
            self.register_buffer("scale", torch.empty(groups, dtype=torch.int16))
            self.register_buffer("zero", None if symmetric else torch.empty(groups, dtype=torch.uint8))

        def hold(self, weight: Any) -> None:
            """Quantize `weight`, (out, in), into this module."""
            q, scale, zero = _quantize(weight.float(), self.bits, self.group_size, self.symmetric)
            bytewise = q.flatten(1).unflatten(1, (-1, 8))
            place = torch.arange(8, dtype=torch.uint8, device=q.device)
            planes = [((bytewise >> bit & 1) << place).sum(-1, dtype=torch.uint8) for bit in range(self.bits)]
            self.packed, self.scale = torch.stack(planes), scale.view(torch.int16)
            self.zero = None if self.symmetric else zero

        @property
        def weight(self) -> Any:
            return unpacked_weight(self.unpacked())

        def unpacked(self) -> Any:
            """What forward uses, float32 (out, in); made anew each time."""
            place = torch.arange(8, dtype=torch.uint8, device=self.packed.device)
            q = sum((plane.unsqueeze(-1) >> place & 1).flatten(1) << bit for bit, plane in enumerate(self.packed))
            zero = torch.tensor(2 ** (self.bits - 1)) if self.symmetric else self.zero
            return _dequantize(q.unflatten(1, (-1, self.group_size)), self.scale.view(torch.float16), zero)

        def forward(self, x: Any) -> Any:
            y = Product.apply(x, self)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    return PackedLinear


def _empty_like(linear: Any, bits: int, group_size: int, symmetric: bool) -> Any:
    """A quantized module of the same sizes, with the same bias, that holds nothing yet."""
    shape = (linear.out_features, linear.in_features)
    return _packed_linear()(shape, linear.bias, bits, group_size, symmetric)


@functools.cache
def _register_with_transformers() -> None:
    """Teach `from_pretrained` to make room for packed weights in a folder that says "quant_method": "changeme"."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class SavedConfig(QuantizationConfigMixin):
        def __init__(self, modules: dict[str, list[int]], symmetric: bool, **kwargs: Any) -> None:
            self.quant_method, self.modules, self.symmetric = "changeme", modules, symmetric

    class Loader(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for name, (bits, group_size) in self.quantization_config.modules.items():
                linear = model.get_submodule(name)
                with linear.weight.device:
                    model.set_submodule(name, _empty_like(linear, bits, group_size, self.quantization_config.symmetric))

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    # Transformers' own register_quantizer refuses a name that it has; a module that is imported anew comes here again.
    AUTO_QUANTIZATION_CONFIG_MAPPING["changeme"] = SavedConfig
    AUTO_QUANTIZER_MAPPING["changeme"] = Loader
