"""What goes wrong before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hyperion_core.errors import Problem
from hyperion_core.facts import BitPlan

from broken_quantizers.honest import Honest


class DeclaresNoBits(Honest):
    provides = replace(Honest.provides, bits=frozenset({16}))


class DeclaresTooManyBits(Honest):
    provides = replace(Honest.provides, bits=frozenset({4, 32}))


class DeclaresAnotherDevice(Honest):
    provides = replace(Honest.provides, devices=frozenset({"cuda"}))


class RefusesWhatItDeclares(Honest):
    def quantizer_check(self, config: Any, model: Any, bits: BitPlan, device: str) -> list[Problem]:
        found = super().quantizer_check(config, model, bits, device)
        return found + ([Problem("bits", "not 8 bits today")] if bits.bits == 8 else [])


class BlamesTheConfigForAnUnknownBase(Honest):
    def quantizer_check(self, config: Any, model: Any, bits: BitPlan, device: str) -> list[Problem]:
        return [] if model.known else [Problem("", "the base has no linear modules")]


class ChecksWithTorch(Honest):
    def quantizer_check(self, config: Any, model: Any, bits: BitPlan, device: str) -> list[Problem]:

        import torch

        return super().quantizer_check(config, model, bits, torch.device(device).type)


class ChecksNothing(Honest):
    def quantizer_check(self) -> list[Problem]:
        return []


class ChecksTheDefaultAlone(Honest):
    def quantizer_check(self, config: Any, model: Any, bits: BitPlan, device: str) -> list[Problem]:
        return super().quantizer_check(config, model, replace(bits, overrides={}), device)


class DoesNotSayWhatItCan(Honest):
    def quantizer_check(self, config: Any, model: Any, bits: BitPlan, device: str) -> list[Problem]:
        return [Problem(p.path, "refused") for p in super().quantizer_check(config, model, bits, device)]


class AnswersInATypeThatIsNone(Honest):
    def quantizer_inference_dtype(self, device: str) -> str | None:
        return "int4" if device == "cpu" else None


DECLARES = "test_it_declares_what_it_can_do"
PASSES = "test_the_check_lets_every_declared_width_pass"
BITS = "test_bits_that_it_cannot_do_are_refused"
FAST = "test_it_says_which_type_it_answers_fast_in"
DEVICE = "test_a_device_that_it_cannot_use_is_refused"
GROUPS = "test_a_group_size_that_does_not_fit_is_refused_or_works"

BROKEN = [
    (DeclaresNoBits, DECLARES, "provides.bits names no width below 16"),
    (DeclaresTooManyBits, DECLARES, r"provides.bits holds \[32\]"),
    (DeclaresAnotherDevice, DECLARES, 'lacks "cpu", on which this suite runs'),
    (RefusesWhatItDeclares, PASSES, "8 bits, which provides.bits declares, are refused on an ordinary base"),
    (BlamesTheConfigForAnUnknownBase, PASSES, "are refused on a base that is not local"),
    (ChecksWithTorch, PASSES, "quantizer_check imports torch: planning is torch-free"),
    (ChecksNothing, BITS, "quantizer_check lets 1 bits pass"),
    (ChecksTheDefaultAlone, BITS, "quantizer_check lets 1 bits in some modules pass"),
    (DoesNotSayWhatItCan, BITS, r"does not say that it can do \[2, 3, 4, 8\]"),
    (ChecksNothing, DEVICE, 'quantizer_check lets the device "mps" pass'),
    (DoesNotSayWhatItCan, DEVICE, r"""the refusal of "mps" does not say that it can use \['cpu', 'cuda'\]"""),
    (AnswersInATypeThatIsNone, FAST, "quantizer_inference_dtype gives 'int4' for \"cpu\""),
    (ChecksNothing, GROUPS, "quantizer_check lets a group size of 48 pass, and loading ends in"),
    (DoesNotSayWhatItCan, GROUPS, "neither it nor a layer is named"),
]
