"""What goes wrong in what is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hyperion_core.errors import Problem
from hyperion_core.facts import BitPlan, Cost, QuantInfo

from broken_quantizers.honest import Afterwards, Honest, live, packed


class RoundsToTwoBitsAlways(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            module.hold(self.quantizer_fake_quantize(module.weight, self.config_class(), 2, 32))


class Overflows(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            module.scale = torch.full(module.scale.shape, float("inf"), dtype=torch.float16).view(torch.int16)


class KeepsTheOriginal(Honest):
    """In an attribute, which neither parameters nor buffers show."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        kept = {m.name: model.get_submodule(m.name).weight.data for m in live(model).linear()}
        model = super().quantizer_after_load(model, config, bits, training)
        for name, module in packed(model).items():
            module.original = kept[name]
        return model


class ForgetsTheScales(Honest):
    def quantizer_estimate(self, config: Any, model: Any, bits: BitPlan, dtype: str) -> Cost:
        cost = super().quantizer_estimate(config, model, bits, dtype)
        scales = sum(3 * m.shape[0] * m.shape[1] // 32 for m in model.linear())
        return Cost({"weights": cost.memory["weights"] - scales}, disk=cost.disk - scales)


class EstimatesForFloat32(Honest):
    def quantizer_estimate(self, config: Any, model: Any, bits: BitPlan, dtype: str) -> Cost:
        return super().quantizer_estimate(config, model, bits, "float32")


class EstimatesTheDiskAsMemory(Honest):
    """It saves the original beside."""

    def quantizer_save(self, model: Any, config: Any, folder: Path) -> list[Path]:
        from safetensors.torch import save_file

        paths = super().quantizer_save(model, config, folder)
        save_file({"original": torch.zeros(100_000)}, folder / "original.safetensors")
        return [*paths, folder / "original.safetensors"]


class EstimatesItsOwnGroups(Honest):
    def quantizer_estimate(self, config: Any, model: Any, bits: BitPlan, dtype: str) -> Cost:
        return super().quantizer_estimate(config, model, replace(bits, group_size=0), dtype)


class EstimatesWithTorch(Honest):
    def quantizer_estimate(self, config: Any, model: Any, bits: BitPlan, dtype: str) -> Cost:
        import torch

        return super().quantizer_estimate(config, model, bits, str(getattr(torch, dtype))[6:])


class ReportsFewerBits(Honest):
    def quantizer_modules(self, model: Any) -> dict[str, QuantInfo]:
        return {name: replace(info, bits=2) for name, info in super().quantizer_modules(model).items()}

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        return Honest().quantizer_after_load(model, config, bits, training)


class KeepsToItsOwnGroups(Honest):
    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        return super().quantizer_after_load(model, config, replace(bits, group_size=0), training)


class ReportsTooFew(ReportsFewerBits):
    def quantizer_modules(self, model: Any) -> dict[str, QuantInfo]:
        return dict(list(Honest().quantizer_modules(model).items())[1:])


class ReportsTheHeadToo(ReportsFewerBits):
    def quantizer_modules(self, model: Any) -> dict[str, QuantInfo]:
        return {**Honest().quantizer_modules(model), "lm_head": QuantInfo(4, 32, 1000)}


class ReportsWithoutScales(ReportsFewerBits):
    def quantizer_modules(self, model: Any) -> dict[str, QuantInfo]:
        found = Honest().quantizer_modules(model).items()
        return {name: replace(info, nbytes=model.get_submodule(name).packed.nbytes) for name, info in found}


class RoundsWithoutPacking(ReportsFewerBits):
    """The weights have the planned values, and their full size."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        for fact in live(model).linear():
            weight = model.get_submodule(fact.name).weight
            weight.data = self.quantizer_fake_quantize(weight.data, config, *bits.of(fact.name))
        return model.requires_grad_(False)

    def quantizer_modules(self, model: Any) -> dict[str, QuantInfo]:
        found = ((m.name, model.get_submodule(m.name).weight) for m in live(model).linear())
        return {name: QuantInfo(2, 32, weight.nbytes) for name, weight in found}


class OffersFinerWeights(Honest):
    """Its weights have more values than its bits can tell apart."""

    def quantizer_dequantize(self, module: Any) -> Any:
        return module.weight + 1e-6 * torch.arange(module.in_features)


class IgnoresOverrides(Honest):
    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        return super().quantizer_after_load(model, config, replace(bits, overrides={}), training)


class QuantizesWhatIsToStay(Honest):
    """Takes 16 bits for 8."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        overrides = {pattern: (min(width, 8), group) for pattern, (width, group) in bits.overrides.items()}
        return super().quantizer_after_load(model, config, replace(bits, overrides=overrides), training)


class AcceptsWhatItDoesNotProvide(Honest):
    provides = replace(Honest.provides, per_module=False)


class RefusesWhatItProvides(Honest):
    def quantizer_check(self, config: Any, model: Any, bits: BitPlan, device: str) -> list[Problem]:
        return [Problem("bits", "the same bits everywhere, please")] if bits.overrides else []


class EstimatesTheDefaultAlone(Honest):
    def quantizer_estimate(self, config: Any, model: Any, bits: BitPlan, dtype: str) -> Cost:
        return super().quantizer_estimate(config, model, replace(bits, overrides={}), dtype)


class EstimatesTheDefaultOnDisk(Honest):
    def quantizer_estimate(self, config: Any, model: Any, bits: BitPlan, dtype: str) -> Cost:
        disk = super().quantizer_estimate(config, model, replace(bits, overrides={}), dtype).disk
        return replace(super().quantizer_estimate(config, model, bits, dtype), disk=disk)


class DropsBiases(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            module.bias = None


class GoesWrongInBfloat16(Afterwards):
    """Its numbers are finite, and not those of its weights."""

    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            module.register_forward_hook(lambda m, x, y: y if y.dtype == torch.float32 else y * 0.9)


class RoundsTheEmbedding(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        embedding = model.get_input_embeddings().weight
        embedding.data = embedding.data.bfloat16().float()


class DropsANorm(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        model.model.norm = torch.nn.Identity()


class DequantizesSomethingElse(Honest):
    def quantizer_dequantize(self, module: Any) -> Any:
        return module.weight * 1.01


class DequantizesToHalf(Honest):
    def quantizer_dequantize(self, module: Any) -> Any:
        return module.weight.half()


class DrawsFromTheRun(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        torch.rand(1)


class IsNeverTheSame(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(ord(os.urandom(1))))
            module.hold(module.weight + noise)


class NeedsNoRows(Honest):
    provides = replace(Honest.provides, calibration=True)


class FailsWithoutRows(NeedsNoRows):
    def quantizer_prepare(self, calibration: Any) -> None:
        next(iter(calibration))


WORKS = "test_every_declared_width_works"
ESTIMATE = "test_the_estimate_is_the_real_size"
TRUTH = "test_the_modules_report_the_truth"
OVERRIDES = "test_overrides_are_honoured"
STAYS = "test_what_is_not_quantized_stays_as_it_is"
DEQUANTIZE = "test_dequantize_gives_what_forward_uses"
SEED = "test_the_same_seed_gives_the_same_bits"
CALIBRATION = "test_without_calibration_data_it_refuses"

BROKEN = [
    (RoundsToTwoBitsAlways, WORKS, "more bits do not bring the model nearer to its base"),
    (Overflows, WORKS, "with 2 bits in bfloat16 the logits are not finite"),
    (KeepsTheOriginal, ESTIMATE, "says .* bytes in memory, and it is"),
    (ForgetsTheScales, ESTIMATE, "with 2 bits over float32 quantizer_estimate says .* bytes in memory"),
    (EstimatesForFloat32, ESTIMATE, "over bfloat16 quantizer_estimate says"),
    (EstimatesTheDiskAsMemory, ESTIMATE, "says .* bytes on disk, and it is"),
    (EstimatesItsOwnGroups, ESTIMATE, "with 2 bits in groups of 64 over float32 quantizer_estimate says"),
    (EstimatesWithTorch, ESTIMATE, "quantizer_estimate imports torch"),
    (ReportsFewerBits, TRUTH, "3 bits, and quantizer_modules reports 2"),
    (KeepsToItsOwnGroups, TRUTH, "gives .* groups of 64, and quantizer_modules reports 32"),
    (ReportsTooFew, TRUTH, r"quantizer_modules lacks them: \['model.layers.0.self_attn.q_proj'\]"),
    (ReportsTheHeadToo, TRUTH, r"lists modules that the plan leaves as they are: \['lm_head'\]"),
    (ReportsWithoutScales, TRUTH, "quantizer_modules reports .* bytes for .*, and it holds"),
    (RoundsWithoutPacking, TRUTH, "is reported with 2 bits, and holds 32.2 bits a weight"),
    (OffersFinerWeights, TRUTH, "is reported with 2 bits, and a row of 4 groups has .* different values"),
    (IgnoresOverrides, OVERRIDES, "lists modules that the plan leaves as they are"),
    (QuantizesWhatIsToStay, OVERRIDES, "lists modules that the plan leaves as they are: .*q_proj"),
    (AcceptsWhatItDoesNotProvide, OVERRIDES, "provides.per_module is False, and quantizer_check lets"),
    (RefusesWhatItProvides, OVERRIDES, "provides.per_module is True, and bits of single modules are refused"),
    (EstimatesTheDefaultAlone, OVERRIDES, "with 2 bits and others in some modules .* bytes in memory"),
    (EstimatesTheDefaultOnDisk, OVERRIDES, "with 2 bits and others in some modules .* bytes on disk"),
    (DropsBiases, STAYS, "the bias of model.layers.0.self_attn.q_proj is lost or changed"),
    (RoundsTheEmbedding, STAYS, "model.embed_tokens.weight, which is not quantized, is changed"),
    (DropsANorm, STAYS, "model.norm.weight, which is not quantized, is gone"),
    (DequantizesSomethingElse, DEQUANTIZE, "is not what forward uses"),
    (GoesWrongInBfloat16, DEQUANTIZE, r"\(2 bits in bfloat16\) is not what forward uses"),
    (DequantizesToHalf, DEQUANTIZE, r"gives \(128, 128\) torch.float16 for .*, not fp32 \(out, in\)"),
    (DrawsFromTheRun, SEED, "draws from the run's random numbers"),
    (IsNeverTheSame, SEED, "the same seed gives other bits the second time"),
    (NeedsNoRows, CALIBRATION, "quantizing with calibration=None is not refused"),
    (FailsWithoutRows, CALIBRATION, "quantizing with calibration=None ends in TypeError, not in HyperionError"),
]
