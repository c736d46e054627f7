"""What goes wrong when it is saved, trained on, or merged into."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hyperion_core.facts import BitPlan

from broken_quantizers.honest import Afterwards, Honest, packed

# --- files ---


class SavesAnotherModel(Honest):
    def quantizer_save(self, model: Any, config: Any, folder: Path) -> list[Path]:
        other = copy.deepcopy(model)
        next(iter(packed(other).values())).zero.add_(1)
        return super().quantizer_save(other, config, folder)


class SavesBitsByModuleWrong(Honest):
    def quantizer_save(self, model: Any, config: Any, folder: Path) -> list[Path]:
        if len({module.bits for module in packed(model).values()}) == 1:
            return super().quantizer_save(model, config, folder)
        return SavesAnotherModel().quantizer_save(model, config, folder)


class SavesPickles(Honest):
    def quantizer_save(self, model: Any, config: Any, folder: Path) -> list[Path]:
        torch.save({}, folder / "extra.pt")
        return [*super().quantizer_save(model, config, folder), folder / "extra.pt"]


class ForgetsAFile(Honest):
    def quantizer_save(self, model: Any, config: Any, folder: Path) -> list[Path]:
        return super().quantizer_save(model, config, folder)[1:]


class SavesOnlyOnce(Honest):
    """What it reloads cannot be written again, as weights that a library has converted while loading."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        again = bool(packed(model))
        model = super().quantizer_after_load(model, config, bits, training)
        model.converted = again
        return model

    def quantizer_save(self, model: Any, config: Any, folder: Path) -> list[Path]:
        if model.converted:
            raise NotImplementedError("reverse_op")
        return super().quantizer_save(model, config, folder)


class LoadsTheOriginalBeside(Honest):
    """What it reloads is larger than what it saved."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        again = bool(packed(model))
        model = super().quantizer_after_load(model, config, bits, training)
        if again:
            model.originals = {name: module.weight for name, module in packed(model).items()}
        return model


class ReportsNothingAfterReloading(Honest):
    def quantizer_modules(self, model: Any) -> Any:
        return {} if "saved" in model.name_or_path else super().quantizer_modules(model)

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        return Honest().quantizer_after_load(model, config, bits, training)


class TrustsTheBase(Honest):
    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        if packed(model):
            return model.requires_grad_(False)
        return super().quantizer_after_load(model, config, bits, training)


class FailsOnAnotherBase(Honest):
    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        assert all(module.bits == bits.bits for module in packed(model).values()), "other bits"
        return super().quantizer_after_load(model, config, bits, training)


# --- training on top ---


class LeavesTheBaseToTrain(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        model.requires_grad_(True)


class GoesPastItsModules(Afterwards):
    """Calculates with their weights without calling them, so what hangs on them is never asked."""

    def more(self, model: Any, bits: BitPlan) -> None:
        for layer in model.model.layers:
            layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(m.act_fn(m.gate_proj(x)) * (x @ m.up_proj.weight.T))


class DriftsWhileTraining(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        def drift(module: Any, inputs: Any, output: Any) -> None:
            module.zero.add_(1)

        for module in packed(model).values():
            module.register_forward_hook(drift)


class LosesWhatWasLearnt(Afterwards):
    """Each pass is further off: the loss grows whatever trains on top."""

    def more(self, model: Any, bits: BitPlan) -> None:
        off = iter(range(1000))
        tilt = torch.linspace(0, 10, model.config.vocab_size)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + next(off) * tilt)


class CutsTheGradient(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            module.forward = torch.no_grad()(module.forward)


class BendsTheGradient(Afterwards):
    def more(self, model: Any, bits: BitPlan) -> None:
        for module in packed(model).values():
            module.register_full_backward_hook(lambda m, below, above: (below[0] * 1.1,))


# --- the weights themselves ---


class LosesWhatIsMerged(Honest):
    """Its modules hand out a weight that anybody may write into, and make it anew the next time."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        model = super().quantizer_after_load(model, config, bits, training)
        for module in packed(model).values():
            module.__class__ = type("PackedLinear", (type(module),), {"weight": property(lambda self: self.unpacked())})
        return model


class FakesAnotherRounding(Honest):
    def quantizer_fake_quantize(self, weight: Any, config: Any, bits: int, group_size: int) -> Any:
        return super().quantizer_fake_quantize(weight, config.model_copy(update={"symmetric": True}), bits, group_size)


class FakesItsOwnGroups(Honest):
    def quantizer_fake_quantize(self, weight: Any, config: Any, bits: int, group_size: int) -> Any:
        return super().quantizer_fake_quantize(weight, config, bits, 0)


class FakesInFloat32(Honest):
    def quantizer_fake_quantize(self, weight: Any, config: Any, bits: int, group_size: int) -> Any:
        return super().quantizer_fake_quantize(weight.float(), config, bits, group_size)


class FakesInPlace(Honest):
    def quantizer_fake_quantize(self, weight: Any, config: Any, bits: int, group_size: int) -> Any:
        return weight.copy_(super().quantizer_fake_quantize(weight, config, bits, group_size))


class GivesTheOldModule(Honest):
    def quantizer_requantize(self, module: Any, weight: Any, config: Any, bits: int) -> Any:
        return module


class RequantizesInPlace(Honest):
    def quantizer_requantize(self, module: Any, weight: Any, config: Any, bits: int) -> Any:
        module.hold(weight)
        return module


class RequantizesWithoutTheBias(Honest):
    def quantizer_requantize(self, module: Any, weight: Any, config: Any, bits: int) -> Any:
        new = super().quantizer_requantize(module, weight, config, bits)
        new.bias = None
        return new


class RequantizesInItsOwnGroups(Honest):
    def quantizer_requantize(self, module: Any, weight: Any, config: Any, bits: int) -> Any:
        shape = (module.out_features, module.in_features)
        new = type(module)(shape, module.bias, bits, 16, config.symmetric)
        new.hold(weight)
        return new


class RequantizesToAModuleThatDoesNotWork(Honest):
    def quantizer_requantize(self, module: Any, weight: Any, config: Any, bits: int) -> Any:
        new = super().quantizer_requantize(module, weight, config, bits)
        new.register_forward_hook(lambda m, inputs, output: output * 2)
        return new


class RecognizesNothing(Honest):
    provides = replace(Honest.provides, reads=frozenset({"another"}))


class RecognizesTheFirstModuleAlone(Honest):
    def quantizer_recognize(self, saved: Any) -> Any:
        options, plan = super().quantizer_recognize(saved)
        return options, BitPlan(*next(iter(plan.overrides.values())))


class RecognizesWithoutGroups(Honest):
    def quantizer_recognize(self, saved: Any) -> Any:
        options, plan = super().quantizer_recognize(saved)
        return options, BitPlan(16, 0, {name: (bits, 32) for name, (bits, _) in plan.overrides.items()})


class RecognizesWithTorch(Honest):
    def quantizer_recognize(self, saved: Any) -> Any:
        import torch

        assert torch.get_num_threads()
        return super().quantizer_recognize(saved)


RECOGNIZED = "test_what_it_saved_it_recognizes"
RELOADED = "test_saved_and_reloaded_it_gives_the_same_logits"
OTHER = "test_a_base_of_other_bits_is_refused"
TRAINING = "test_training_on_top_leaves_the_base_alone"
GRADIENT = "test_gradients_are_those_of_the_dequantized_weight"
FAKE = "test_fake_quantize_agrees_with_the_real_one"
WRITTEN = "test_what_is_written_into_a_weight_is_not_lost"
REQUANTIZE = "test_requantize_holds_the_weight_that_it_is_given"

BROKEN = [
    (SavesAnotherModel, RELOADED, "saved and loaded again, it gives other logits"),
    (SavesBitsByModuleWrong, RELOADED, "bits by module, saved and loaded again, it gives other logits"),
    (SavesPickles, RELOADED, r"saved as pickles, which can run code: \['extra.pt'\]"),
    (ForgetsAFile, RELOADED, "quantizer_save answers with .*, and wrote .*config.json"),
    (SavesOnlyOnce, RELOADED, "saved and loaded again, it cannot be saved: NotImplementedError: reverse_op"),
    (LoadsTheOriginalBeside, RELOADED, "loaded again it takes .* bytes"),
    (ReportsNothingAfterReloading, RELOADED, "quantizer_modules reports something else"),
    (RecognizesNothing, RECOGNIZED, r"config.json says quant_method .changeme., and provides.reads has \['another'\]"),
    (RecognizesTheFirstModuleAlone, RECOGNIZED, r"saved with \(bits, group size\) .*, and quantizer_recognize reads"),
    (RecognizesWithoutGroups, RECOGNIZED, r"saved with \(bits, group size\) \(2, 64\), and .* reads \(2, 32\)"),
    (RecognizesWithTorch, RECOGNIZED, "quantizer_recognize imports torch"),
    (TrustsTheBase, OTHER, "a base saved with 2 bits, under a plan of 8 is not refused"),
    (FailsOnAnotherBase, OTHER, "ends in AssertionError, not in HyperionError"),
    (LeavesTheBaseToTrain, TRAINING, "of the base train"),
    (GoesPastItsModules, TRAINING, "no gradient reaches 4 of 28 tensors"),
    (DriftsWhileTraining, TRAINING, r"changes these tensors of the base: \['.*q_proj.zero'"),
    (LosesWhatWasLearnt, TRAINING, "over 2 bits 5 steps do not lower the loss"),
    (CutsTheGradient, GRADIENT, "no gradient goes through"),
    (BendsTheGradient, GRADIENT, "is not that of its weight"),
    (LosesWhatIsMerged, WRITTEN, "what is assigned to .*q_proj.weight.data is lost without a word"),
    (FakesAnotherRounding, FAKE, "is not what quantizing gives"),
    (FakesItsOwnGroups, FAKE, r"\(2 bits in groups of 64\) is not what quantizing gives"),
    (FakesInFloat32, FAKE, r"turns \(128, 128\) torch.bfloat16 into \(128, 128\) torch.float32"),
    (FakesInPlace, FAKE, "changes the weight that it is given"),
    (GivesTheOldModule, REQUANTIZE, "a changed weight, put back by quantizer_requantize in 2 bits, is .* off"),
    (RequantizesInPlace, REQUANTIZE, "quantizer_requantize changes the module"),
    (RequantizesWithoutTheBias, REQUANTIZE, "quantizer_requantize loses or changes the bias of"),
    (RequantizesInItsOwnGroups, REQUANTIZE, "of 2 bits in groups of 32 into QuantInfo"),
    (RequantizesToAModuleThatDoesNotWork, REQUANTIZE, "the module of quantizer_requantize uses other numbers"),
]
