"""Bits, groups and calibration data that do not fit, and bases that are quantized already."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .case import Case, Place
from .model import WEIGHTS, config, cut, folder, trained

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
GPT2 = {"version": 1, "model_type": "gpt2", "group_size": 16, "modules": {"transformer.h.0.attn.c_attn": 4}}
NOWHERE = {"dataset": "nowhere.jsonl"}


def validated(**quantization: Any) -> Callable[[Place], Sequence[str | Path]]:
    return lambda place: ["validate", place.config(quantization=quantization)]


def budgeted(megabytes: float) -> Callable[[Place], Sequence[str | Path]]:
    """In a type of its own: by itself it is the processor's."""
    quantization = {"method": "torchao", "bits": "auto", "budget_mb": megabytes}
    return lambda place: ["validate", place.config(dtype="bfloat16", quantization=quantization)]


def planned(content: str, **quantization: Any) -> Callable[[Place], Sequence[str | Path]]:
    """Validate a config that names a file of bits."""

    def arrange(place: Place) -> list[str]:
        place.write("bits.json", content)
        return ["validate", place.config(quantization={"method": "torchao", "bit_plan": "bits.json", **quantization})]

    return arrange


def too_short(place: Place) -> Sequence[str | Path]:
    changes: dict[str, Any] = {"method": "gptq", "group_size": 16, "calibration": {"rows": 2, "max_length": 4}}
    return ["train", place.config(quantization=changes), "--output_dir", "run"]


def case(what: str, arrange: Callable[[Place], Sequence[str | Path]], *says: str) -> Case:
    return Case("quantization", what, arrange, says)


CASES: tuple[Case, ...] = (
    case("bits that bnb does not have", validated(method="bnb", bits=3), "3 bits", "4", "8"),
    case("bits that gptq does not have", validated(method="gptq", bits=5), "5 bits", "2, 3, 4, 8"),
    case("bits that torchao does not have", validated(method="torchao", bits=1), "1 bit", "2, 3, 4, 5, 6, 7, 8"),
    case("more bits than there are", validated(method="gptq", bits=32), "quantization.bits: 32 is refused"),
    case("a block size that bnb does not have", validated(method="bnb", group_size=48), "48", "64"),
    case("groups that do not divide a layer, gptq", validated(method="gptq", group_size=48), "48", "mlp.gate_proj"),
    case("groups that do not divide a layer, torchao", validated(method="torchao", group_size=48), "48",
         "mlp.gate_proj"),
    case("double_quant with gptq", validated(method="gptq", double_quant=True), "quantization.double_quant"),
    case("double_quant with bnb in 8 bits", validated(method="bnb", bits=8, double_quant=True), "double_quant"),
    case("options that no installed quantizer takes", validated(bits=3, double_quant=True),
         "no installed quantizer does what these options ask for", "bnb:", "gptq:", "torchao:"),
    case("bits: auto without a budget", validated(method="torchao", bits="auto"), "bits: auto has no budget"),
    case("bits: auto with two budgets", validated(method="torchao", bits="auto", target_bits=3, budget_mb=9),
         "bits: auto has two budgets"),
    case("bits: auto below what there is", validated(method="torchao", bits="auto", target_bits=1.5),
         "1.5 bits cannot be reached"),
    case("bits: auto with a method that has none by module", validated(method="bnb", bits="auto", target_bits=3.5),
         '"bnb" has no bits by module'),
    case("bits: auto in less than the embeddings take", budgeted(0.01),
         "the model cannot be held in 0.01 MB", "embeddings and norms", "raise it to"),
    case("target_bits with a number of bits", validated(method="torchao", bits=4, target_bits=3.5), "needs bits: auto"),
    case("a file of bits that is not there", validated(method="torchao", bit_plan="nowhere.json"), "nowhere.json"),
    case("a file of bits that is no JSON", planned("3 bits, please"), "bits.json"),
    case("a file of bits of another model", planned(json.dumps(GPT2)),
         "bits.json"),
    case("a file of bits beside bits", planned("{}", bits=4), "stands beside bit_plan"),
    case("no calibration data where the config says it is",
         validated(method="gptq", calibration=NOWHERE), "quantization.calibration", "nowhere.jsonl"),
    case("calibration data for a method that measures nothing", validated(method="bnb", calibration={"rows": 8}),
         "nothing is measured in this run"),
    case("calibration data that is too short", too_short, "the calibration data is too short: 8 tokens in 2 rows"),
    case("a quantized model, quantized again by another method",
         folder(config(quantization_config=GPTQ), quantization={"method": "bnb"}), 'quantized already, by "gptq"'),
    case("a quantized model, asked for in other bits",
         folder(config(quantization_config=GPTQ), quantization={"method": "gptq", "bits": 3}),
         "bits: 4 in the checkpoint, 3 in the config"),
    case("a model quantized by a method that nothing here loads",
         folder(config(quantization_config={"quant_method": "quip"})), 'quantized already, by "quip"'),
    case("a quantized model that does not say how", folder(config(quantization_config={"bits": 4})), "quant_method"),
    case("a quantized model whose weights are another architecture's", trained(config(quantization_config=GPTQ)),
         "model"),
    case("a quantized model that breaks off", folder(lambda place: (config(quantization_config=GPTQ)(place),
         cut(WEIGHTS, 0.5)(place))[0]), "is not a whole safetensors file", "cut short"),
)  # fmt: skip
