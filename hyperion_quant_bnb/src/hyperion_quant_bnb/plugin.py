"""The quantizer: planning without torch here, the rest in `loading` and `linear`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, Problem
from hyperion_core.facts import BitPlan, Cost, ModelFacts, Provides, QuantInfo
from hyperion_core.kinds import Quantizer

from . import sizes
from .chosen import UNQUANTIZED, WIDTHS, chosen_modules, is_skipped, plan_problems, skip_problems
from .config import DEFAULT_BLOCK, BnbConfig

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class BnbQuantizer(Quantizer):
    """bitsandbytes: all linear modules of the layers in 4 bits, or all in 8, but for those that stay as they are."""

    config_class = BnbConfig
    trained_under = frozenset({"lora"})
    provides = Provides(
        bits=WIDTHS,
        trainable=True,
        devices=frozenset({"cpu", "cuda"}),
        dequantize=True,
        reads=frozenset({"bitsandbytes"}),
    )

    # --- planning: no torch here ---

    def quantizer_check(self, config: BnbConfig, model: ModelFacts, bits: BitPlan, device: str) -> list[Problem]:
        problems = plan_problems(config, bits)
        if device not in self.provides.devices:
            offered = " or ".join(sorted(self.provides.devices))
            problems.append(Problem("", f'bitsandbytes does not work on "{device}"', fix=f"train on {offered}"))
        return problems + skip_problems(config, model, bits)

    def quantizer_estimate(self, config: BnbConfig, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
        resident = disk = model.parameters * _DTYPE_BYTES[dtype]
        shapes = {module.name: module.shape for module in model.linear()}
        chosen = chosen_modules(model, config, bits)
        for name, (width, block) in chosen.items():
            rows, columns = shapes[name]
            if width == 4:
                held, written = sizes.four_bit(rows, columns, block, config.double_quant_in_force)
            else:
                held, written = sizes.eight_bit(rows, columns)
            plain = rows * columns * _DTYPE_BYTES[dtype]
            resident, disk = resident + held - plain, disk + written - plain
        if config.double_quant_in_force and any(width == 4 for width, _ in chosen.values()):
            resident += sizes.SHARED_MAP
        return Cost({"weights": resident}, disk=disk)

    def quantizer_recognize(self, saved: Mapping[str, Any], model: ModelFacts) -> tuple[dict[str, Any], BitPlan]:
        options: dict[str, Any]
        if saved.get("load_in_4bit"):
            block = saved.get("bnb_4bit_blocksize")  # ours; where it is missing, each weight's file entry has it
            options = {
                "bits": 4,
                "quant_type": saved.get("bnb_4bit_quant_type", "fp4"),
                "double_quant": bool(saved.get("bnb_4bit_use_double_quant", False)),
                **({"group_size": block} if block else {}),
            }
        elif saved.get("load_in_8bit"):
            options = {"bits": 8}
        else:
            raise CompatibilityError(
                "the checkpoint says neither that it has 4 bits nor that it has 8",
                why="load_in_4bit and load_in_8bit are both false in its quantization_config",
                fix="start from the unquantized model, or quantize it again",
            )
        pair = options["bits"], options.get("group_size", 0)
        if not model.known:
            return options, BitPlan(*pair)
        skipped = saved.get("llm_int8_skip_modules") or []
        left = {module.name for module in model.linear() if is_skipped(module.name, skipped)}
        return options, BitPlan(UNQUANTIZED, 0, {m.name: pair for m in model.linear() if m.name not in left})

    # --- loading ---

    def quantizer_load_kwargs(self, source: Path, config: BnbConfig, bits: BitPlan, ctx: RunContext) -> dict[str, Any]:
        from .loading import load_kwargs

        return load_kwargs(source, config, bits, ctx)

    def quantizer_after_load(self, model: Any, config: BnbConfig, bits: BitPlan) -> Any:
        from hyperion_core.live_facts import live_model_facts

        from .loading import after_load

        return after_load(model, config, chosen_modules(live_model_facts(model), config, bits))

    def quantizer_modules(self, model: Any) -> Mapping[str, QuantInfo]:
        from .linear import tensors
        from .loading import is_quantized

        infos = {}
        for name, module in model.named_modules():
            if is_quantized(module):
                state = getattr(module.weight, "quant_state", None)
                width, block = (8, 0) if state is None else (4, state.blocksize)
                infos[name] = QuantInfo(width, block, sum(tensor.nbytes for tensor in tensors(module)))
        return infos

    # --- the weights themselves ---

    def quantizer_fake_quantize(self, weight: Any, config: BnbConfig, bits: int, group_size: int) -> Any:
        from .linear import rounded

        block = group_size or config.group_size or DEFAULT_BLOCK
        back = rounded(weight, bits, block, config.type_in_force, config.double_quant_in_force)
        return back.to(weight.dtype)

    def quantizer_dequantize(self, module: Any) -> Any:
        from .linear import dequantized

        return dequantized(module)

    def quantizer_requantize(self, module: Any, weight: Any, config: BnbConfig, bits: int) -> Any:
        from .linear import requantized

        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            return requantized(module, weight, bits, state.blocksize, state.quant_type, state.nested)
        block = config.group_size or DEFAULT_BLOCK
        return requantized(module, weight, bits, block, config.type_in_force, config.double_quant_in_force)

    def quantizer_save(self, model: Any, config: BnbConfig, folder: Path) -> list[Path]:
        before = set(folder.iterdir())
        # transformers cannot undo what it did to weights that were quantized already as it loaded them.
        loaded_so = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
        model.save_pretrained(folder, save_original_format=not loaded_so)
        return sorted(set(folder.iterdir()) - before)
