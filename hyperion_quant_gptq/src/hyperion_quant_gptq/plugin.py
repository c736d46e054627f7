"""The hooks. A model is quantized offline, by what flows through it, into a checkpoint that is then loaded."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, DataError, ModelError, Problem
from hyperion_core.facts import BitPlan, Cost, ModelFacts, Provides, QuantInfo
from hyperion_core.kinds import Quantizer

from .config import GptqConfig
from .grouping import (
    AS_IT_IS,
    BITS,
    KERNEL_GROUP_SIZES,
    Layout,
    default_group_size,
    embedding_misfits,
    layouts,
    misfits,
    table_bytes,
    tables,
)
from .saved_format import OURS, QUANT_METHOD, loading_config, read, written

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .packed_linear import PackedLinear

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class GptqQuantizer(Quantizer):
    """Quantizes every linear module but the output head."""

    config_class = GptqConfig
    trained_under = frozenset({"lora"})
    provides = Provides(
        bits=BITS,
        per_module=True,
        trainable=True,
        devices=frozenset({"cpu", "cuda"}),
        dequantize=True,
        calibration=True,
        reads=frozenset({QUANT_METHOD, OURS}),
    )

    # --- planning: no torch here ---

    def quantizer_check(self, config: GptqConfig, model: ModelFacts, bits: BitPlan, device: str) -> list[Problem]:
        problems = []
        asked = {width for width, _ in [(bits.bits, 0), *bits.overrides.values()]}
        offered = ", ".join(map(str, sorted(self.provides.bits)))
        for wrong in sorted(asked - self.provides.bits - {AS_IT_IS}):
            why, fix = "the format packs no other widths", f"take one of {offered}"
            problems.append(Problem("bits", f"gptq cannot hold weights in {wrong} bits", why, fix))
        if ({bits.of(module.name)[0] for module in model.linear()} if model.known else asked) == {AS_IT_IS}:
            fix = f"set bits to one of {offered}, or leave out quantization"
            problems.append(Problem("bits", "16 bits quantize nothing", fix=fix))
        if device not in self.provides.devices:
            usable = " or ".join(sorted(self.provides.devices))
            problems.append(Problem("", f'gptq does not work on "{device}"', fix=f"train on {usable}"))
        if config.embedding_bits:
            problems += embedding_misfits(model)
        return problems or misfits(model, bits)

    def quantizer_estimate(self, config: GptqConfig, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
        each = _DTYPE_BYTES[dtype]
        packed = layouts(model, bits)
        saved = sum(each * layout.shape[0] * layout.shape[1] - layout.nbytes for layout in packed)
        if config.embedding_bits:
            saved += sum(
                each * rows * width - table_bytes(rows, width, config.embedding_bits) for rows, width in tables(model)
            )
        total = model.parameters * each - saved
        return Cost({"weights": total}, disk=total)

    def quantizer_recognize(self, saved: Mapping[str, Any], model: ModelFacts) -> tuple[dict[str, Any], BitPlan]:
        found = read(saved, model)
        options = dict(found.options)
        for index, key in enumerate(("bits", "group_size")):
            if len(values := {pair[index] for pair in found.modules.values()}) == 1:
                options[key] = values.pop()
        if not model.known:
            return options, BitPlan(found.default[0], max(found.default[1], 0))
        return options, BitPlan(AS_IT_IS, 0, found.modules)

    def quantizer_inference_dtype(self, config: GptqConfig, bits: BitPlan, device: str) -> str | None:
        """bfloat16 where torch's kernel for 4-bit weights takes them: without, they are unpacked for each token."""
        if device != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
            return None
        groups = {size for width, size in [(bits.bits, bits.group_size), *bits.overrides.values()] if width != AS_IT_IS}
        taken = config.sym and not config.desc_act and groups and groups <= KERNEL_GROUP_SIZES
        return "bfloat16" if taken else None

    # --- quantizing ---

    def quantizer_prepare(
        self, source: Path, config: GptqConfig, bits: BitPlan, calibration: Iterable[Mapping[str, Tensor]] | None,
        folder: Path, ctx: RunContext,
    ) -> Path | None:  # fmt: skip
        if (saved := _saved(source)) is not None:
            if saved.get("quant_method") not in self.provides.reads:
                raise CompatibilityError(
                    f'{source} is quantized already, by "{saved.get("quant_method")}"',
                    why="what rounding took away does not come back: a second rounding adds its error to the first",
                    fix="start from the unquantized model, or name that method",
                )
            return None
        if calibration is None:
            raise DataError(
                "GPTQ has no calibration data",
                why="it rounds each layer by what flows into it",
                fix="give rows of what the model is for: quantization.calibration.dataset, or the run's training data",
            )
        from .offline import quantize_folder

        quantize_folder(source, config, bits, calibration, folder, ctx)
        return folder

    # --- loading ---

    def quantizer_load_kwargs(self, source: Path) -> dict[str, Any]:
        saved = _saved(source)
        if saved is None or saved.get("quant_method") not in self.provides.reads:
            raise CompatibilityError(
                f"{source} is no checkpoint of GPTQ",
                why="its config.json says nothing of it",
                fix="quantize it first: hyperion quantize --method gptq",
            )
        return {"quantization_config": loading_config(saved)}

    def quantizer_after_load(self, model: Any, config: GptqConfig, bits: BitPlan, training: bool) -> Module:
        from .packed_embedding import embedding_bits
        from .packed_linear import facts_of, packed_modules

        packed = packed_modules(model)
        saved = model.config.quantization_config.hyperion_saved if packed else {}
        planned = {each.name: (each.bits, each.group_size) for each in layouts(facts_of(model), bits)}
        found = {name: (module.bits, module.group_size) for name, module in packed.items()}
        for name in [*planned, *found]:
            if planned.get(name) != found.get(name):
                raise _otherwise(f"{name} has {_said(found.get(name))}, and the plan says {_said(planned.get(name))}")
        for key in ("sym", "desc_act"):
            has, wanted = saved.get(key, key == "sym"), getattr(config, key)
            if packed and has != wanted:
                raise _otherwise(f"it has {key}: {str(has).lower()}, and the plan says {key}: {str(wanted).lower()}")
        has = embedding_bits(model)
        if packed and has != config.embedding_bits:
            raise _otherwise(f"it has embedding_bits: {has}, and the plan says embedding_bits: {config.embedding_bits}")
        for name, module in packed.items():
            _check_groups(name, module)
            module.settle()
        model.config.quantization_config = {**saved, "quant_method": OURS if has else QUANT_METHOD}
        return model.requires_grad_(False)

    def quantizer_modules(self, model: Module) -> Mapping[str, QuantInfo]:
        from .packed_linear import packed_modules

        return {
            name: QuantInfo(m.bits, m.group_size, sum(t.nbytes for t in [*m.parameters(), *m.buffers()]))
            for name, m in packed_modules(model).items()
        }

    # --- the weights themselves ---

    def quantizer_fake_quantize(
        self, weight: Tensor, config: GptqConfig, bits: int, group_size: int, stats: Mapping[str, Tensor] | None
    ) -> Tensor:
        """With the inputs' second moment, by GPTQ; else to the nearest."""
        from .rounding import restored, rounded

        rows, columns = weight.shape
        group_size = group_size or default_group_size(columns)
        if stats is None:
            return restored(rounded(weight, bits, group_size, config.sym), ordered=True).to(weight.dtype)
        from .calibrated import rounded_by

        layout = Layout(f"a weight of {rows} × {columns}", (rows, columns), bits, group_size)
        return rounded_by(weight, stats["second_moment"], layout, config).to(weight.dtype)

    def quantizer_dequantize(self, module: PackedLinear) -> Tensor:
        return module.unpacked().float()

    def quantizer_requantize(self, module: PackedLinear, weight: Tensor, config: GptqConfig, bits: int) -> Module:
        from .packed_linear import PackedLinear
        from .rounding import rounded

        shape = (module.out_features, module.in_features)
        with module.qweight.device:
            packed = PackedLinear(shape, module.bias, bits, module.group_size, sym=module.sym, version=module.version)
        packed.hold(rounded(weight, bits, module.group_size, module.sym))
        return packed

    def quantizer_save(self, model: Any, config: GptqConfig, folder: Path) -> list[Path]:
        from .packed_embedding import embedding_bits
        from .packed_linear import facts_of, packed_modules

        packed = packed_modules(model)
        before, was = set(folder.iterdir()), getattr(model.config, "quantization_config", None)
        left = [fact.name for fact in facts_of(model).linear() if fact.name not in packed]
        version = next((module.version for module in packed.values()), 1)
        model.config.quantization_config = written(config, packed, left, version, embedding_bits(model))
        try:
            model.save_pretrained(folder)
        finally:
            model.config.quantization_config = was
        return sorted(set(folder.iterdir()) - before)


def _saved(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a model folder's config.json."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path} cannot be read", why=f"{type(error).__name__}: {error}", fix="copy the model again"
        ) from error
    return dict(found) if found else None


def _check_groups(name: str, module: PackedLinear) -> None:
    """A group that does not exist would be read from beyond the scales."""
    if module.g_idx.min() < 0 or module.g_idx.max() >= module.scales.shape[0]:
        raise ModelError(
            f"{name} is damaged: its inputs belong to groups that do not exist",
            why=f"g_idx goes from {int(module.g_idx.min())} to {int(module.g_idx.max())}, "
            f"and there are {module.scales.shape[0]} groups",
            fix="copy the model again, or quantize it again",
        )


def _otherwise(why: str) -> CompatibilityError:
    return CompatibilityError(
        "the base is quantized otherwise than planned",
        why=why,
        fix="ask for what it has, or start from the unquantized model",
    )


def _said(pair: tuple[int, int] | None) -> str:
    return "its full weight" if pair is None else f"{pair[0]} bits in groups of {pair[1]}"
