"""The hooks. Weights are rounded by torchao once they are loaded; no calibration data is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import ArtifactError, CompatibilityError, Problem
from hyperion_core.facts import BitPlan, Cost, ModelFacts, ModuleFact, Provides, QuantInfo
from hyperion_core.kinds import Quantizer

from .config import GROUP_SIZES, TorchaoConfig, default_group_size
from .saved_format import QUANT_METHOD, quantization_config, register_with_transformers, saved_options

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .packed_linear import PackedLinear

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_AS_IT_IS = 16  # bits of a module that is not quantized


class TorchaoQuantizer(Quantizer):
    """Quantizes every linear module but the output head."""

    config_class = TorchaoConfig
    trained_under = frozenset({"lora"})
    provides = Provides(
        bits=frozenset({2, 3, 4, 5, 6, 7, 8}),
        per_module=True,
        trainable=True,
        devices=frozenset({"cpu", "cuda"}),
        dequantize=True,
        reads=frozenset({QUANT_METHOD}),
    )

    # --- planning: no torch here ---

    def quantizer_check(self, config: TorchaoConfig, model: ModelFacts, bits: BitPlan, device: str) -> list[Problem]:
        problems = []
        asked = {width for width, _ in [(bits.bits, 0), *bits.overrides.values()]}
        if not _chosen(model, bits) and model.known:
            fix = "set bits to another number, or leave out quantization"
            problems.append(Problem("bits", "16 bits quantize nothing", fix=fix))
        for wrong in sorted(asked - self.provides.bits - {_AS_IT_IS}):
            offered = ", ".join(map(str, sorted(self.provides.bits)))
            why, fix = "torchao rounds to integers of other widths", f"take one of {offered}"
            problems.append(Problem("bits", f"torchao cannot hold weights in {wrong} bits", why, fix))
        if device not in self.provides.devices:
            offered = " or ".join(sorted(self.provides.devices))
            problems.append(Problem("", f'the packed weights do not work on "{device}"', fix=f"train on {offered}"))
        return problems + _misfits(model, bits)

    def quantizer_estimate(self, config: TorchaoConfig, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
        total = model.parameters * _DTYPE_BYTES[dtype]
        for module, width, group_size in _chosen(model, bits):
            rows, columns = module.shape
            groups = rows * columns // group_size if group_size else 0
            held = rows * columns * width // 8 + groups * (2 if config.sym else 3)  # scale, and zero point
            total += held - rows * columns * _DTYPE_BYTES[dtype]
        return Cost({"weights": total}, disk=total)

    def quantizer_recognize(self, saved: Mapping[str, Any]) -> tuple[dict[str, Any], BitPlan]:
        options, modules = saved_options(saved)
        for index, key in enumerate(("bits", "group_size")):
            if len(values := {pair[index] for pair in modules.values()}) == 1:
                options[key] = values.pop()
        return options, BitPlan(_AS_IT_IS, 0, modules)

    # --- loading ---

    def quantizer_load_kwargs(self) -> dict[str, Any]:
        register_with_transformers()  # for a model that `quantizer_save` wrote
        return {}

    def quantizer_after_load(self, model: Module, config: TorchaoConfig, bits: BitPlan, training: bool) -> Module:
        from hyperion_core.live_facts import live_model_facts

        from .packed_linear import linear_weight, packed_like, packed_modules

        _refuse_other_methods(model)
        chosen = _chosen(live_model_facts(model), bits)
        planned = {module.name: (width, group_size) for module, width, group_size in chosen}
        if not packed_modules(model):
            for name, (width, group_size) in planned.items():
                linear: Any = model.get_submodule(name)
                packed = packed_like(linear, width, group_size, config.sym)
                packed.hold(linear_weight(linear), config)
                model.set_submodule(name, packed)  # nothing holds the full weight any longer
        _verify(packed_modules(model), planned, config)
        model.config.quantization_config = quantization_config(config, planned)
        return model.requires_grad_(False)

    def quantizer_modules(self, model: Module) -> Mapping[str, QuantInfo]:
        from .packed_linear import packed_modules

        return {
            name: QuantInfo(m.bits, m.group_size, sum(t.nbytes for t in [*m.parameters(), *m.buffers()]))
            for name, m in packed_modules(model).items()
        }

    # --- the weights themselves ---

    def quantizer_fake_quantize(self, weight: Tensor, config: TorchaoConfig, bits: int, group_size: int) -> Tensor:
        from .rounding import restored, rounded

        found = rounded(weight, bits, group_size or default_group_size(weight.shape[1]), config)
        zero = 2 ** (bits - 1) if found.zero is None else found.zero
        return restored(found.numbers, found.scale, zero).to(weight.dtype)

    def quantizer_dequantize(self, module: PackedLinear) -> Tensor:
        return module.unpacked()

    def quantizer_requantize(self, module: PackedLinear, weight: Tensor, config: TorchaoConfig, bits: int) -> Module:
        from .packed_linear import packed_like

        packed = packed_like(module, bits, module.group_size, config.sym)
        packed.hold(weight, config)
        return packed

    def quantizer_save(self, model: Any, config: TorchaoConfig, folder: Path) -> list[Path]:
        from safetensors import SafetensorError

        before = set(folder.iterdir())
        try:
            model.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"the quantized model cannot be written to {folder}",
                why=str(error),
                fix="free some space there, or choose another folder",
            ) from error
        return sorted(set(folder.iterdir()) - before)


def _chosen(model: ModelFacts, bits: BitPlan) -> list[tuple[ModuleFact, int, int]]:
    """(module, bits, group size) of what is to be quantized. Group size 0: the width has no group size of ours."""
    found = [(module, *bits.of(module.name)) for module in model.linear()]
    return [(m, width, size or default_group_size(m.shape[1])) for m, width, size in found if width != _AS_IT_IS]


def _misfits(model: ModelFacts, bits: BitPlan) -> list[Problem]:
    chosen = _chosen(model, bits)
    problems = []
    for size in sorted({size for _, _, size in chosen if size}):
        wrong = [m for m, _, own in chosen if own == size and m.shape[1] % size]
        if wrong:
            widths = {m.shape[1] for m, _, own in chosen if own == size}
            fitting = [str(one) for one in GROUP_SIZES if not any(width % one for width in widths)]
            choose = f"take {' or '.join(fitting)}, which divide them all; or leave" if fitting else "leave"
            what = f"groups of {size} do not divide the widths of {len(wrong)} layers"
            fix = f"{choose} group_size out: each layer then has the largest of {_listed(GROUP_SIZES)} that fits"
            problems.append(Problem("group_size", what, _some(wrong), fix))
    odd = [module for module, _, _ in chosen if module.shape[1] % 8]
    if odd:
        what = f"{len(odd)} layers have a width that is no multiple of 8, and cannot be packed into bytes"
        fix = "leave them as they are: 16 bits for them in a bit plan; or take another method"
        problems.append(Problem("", what, _some(odd), fix))
    return problems


def _some(modules: list[ModuleFact]) -> str:
    first = "; ".join(f"{module.name} has {module.shape[1]} inputs" for module in modules[:3])
    return first + (f"; and {len(modules) - 3} more" if len(modules) > 3 else "")


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes[:-1])) + f" and {sizes[-1]}"


def _refuse_other_methods(model: Any) -> None:
    saved = getattr(model.config, "quantization_config", None)
    if saved is None:
        return
    found = saved.get("quant_method") if isinstance(saved, Mapping) else getattr(saved, "quant_method", None)
    if found != QUANT_METHOD:
        raise CompatibilityError(
            f'the base is quantized already, by "{getattr(found, "value", found)}"',
            why="what rounding took away does not come back: a second rounding adds its error to the first",
            fix="start from the unquantized model, or name that method",
        )


def _verify(modules: Mapping[str, PackedLinear], planned: Mapping[str, tuple[int, int]], config: TorchaoConfig) -> None:
    wanted = {name: (*pair, config.sym) for name, pair in planned.items()}
    found = {name: (module.bits, module.group_size, module.sym) for name, module in modules.items()}
    if found == wanted:
        return
    name = next(name for name in [*wanted, *found] if wanted.get(name) != found.get(name))
    is_, should = (_described(each.get(name)) for each in (found, wanted))
    raise CompatibilityError(
        "the base is quantized otherwise than planned",
        why=f"{name} has {is_}, and the plan says {should}",
        fix="ask for the bits, group size and sym that it has, or start from the unquantized model",
    )


def _described(module: tuple[int, int, bool] | None) -> str:
    if module is None:
        return "its full weight"
    bits, group_size, sym = module
    return f"{bits} bits in groups of {group_size}, sym: {str(sym).lower()}"
