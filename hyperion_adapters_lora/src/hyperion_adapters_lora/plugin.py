"""LoRA as a plugin: what its config means, what it costs, and how peft is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import CompatibilityError, Problem
from hyperion_core.facts import Capabilities, ModelFacts, ModuleFact, Provides, Workload

from hyperion_peft import ALL_LINEAR, PeftAdapter, Selection, Targets, peft_mapping
from hyperion_peft.cost import BYTES, fp32_copy

from .config import REFUSED, LoraConfig

if TYPE_CHECKING:
    import peft

_MAPPING = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
_BASE_CHANGING = ("pissa", "olora", "loftq", "lora_ga", "corda")


class LoraAdapter(PeftAdapter):
    """Low-rank adapters. Left out, target_modules is PEFT's choice for the architecture, or all linear modules."""

    config_class = LoraConfig
    capabilities = Capabilities(mergeable=True, new_tokens=True)
    peft_type = "LORA"
    wraps = frozenset({"linear", "embedding"})
    scales = True

    def selection(self, config: LoraConfig, model: ModelFacts) -> Selection:
        return Selection(
            target_modules=config.target_modules or _default_targets(model),
            exclude_modules=config.exclude_modules,
            modules_to_save=config.modules_to_save,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        )

    def peft_config(self, config: LoraConfig, targets: Targets, tokens: Mapping[str, list[int]]) -> peft.LoraConfig:
        import peft

        options = {key: value for key, value in config.given().items() if key != "type"}
        options["target_modules"] = targets.names
        options["modules_to_save"] = list(targets.saved_paths) or None
        options["task_type"] = config.task_type
        options["trainable_token_indices"] = dict(tokens) or None
        if targets.selection.target_modules == ALL_LINEAR:
            for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
                options.pop(key, None)  # the names above are what is left
        for key in ("rank_pattern", "alpha_pattern"):
            options[key] = options.get(key) or {}
        return peft.LoraConfig(**options)

    def parameters_of(self, config: LoraConfig, module: ModuleFact, targets: Targets) -> int:
        out, into = module.shape
        rank = self._rank(config, module)
        count = rank * (out + into) + (out if config.lora_bias else 0)
        if config.use_dora:
            count += into if module.kind == "embedding" else out
        if config.bias == "lora_only" and module.bias:
            count += out
        return count

    def further_parameters(self, config: LoraConfig, model: ModelFacts, targets: Targets) -> int:
        if config.bias != "all":
            return 0
        saved = {module.name for module in targets.saved}
        return sum(m.shape[0] for m in model.modules if m.bias and m.name not in saved)

    def kept_of(self, config: LoraConfig, module: ModuleFact, targets: Targets, work: Workload) -> float:
        into = 0 if module.kind == "embedding" else module.shape[1]
        kept = BYTES * self._rank(config, module) + fp32_copy([into], work)
        if config.lora_dropout:
            kept += (BYTES + 1) * into  # the dropped-out input, and its mask
        return kept

    def further_bytes(self, config: LoraConfig, targets: Targets) -> int:
        # DoRA builds the whole updated weight of one module at a time, to take its norm.
        return BYTES * max((m.shape[0] * m.shape[1] for m in targets.modules), default=0) if config.use_dora else 0

    def further_problems(self, config: LoraConfig, model: ModelFacts, quantizer: Provides | None) -> list[Problem]:
        if config.use_dora and quantizer is not None and "dequantize" not in quantizer.offers():
            return [
                Problem(
                    "use_dora",
                    "DoRA cannot work on this quantized base",
                    "it needs the weights in full precision, and the quantizer does not hand them out",
                    "use_dora: false, or another quantizer",
                )
            ]
        return self._rank_problems(config, model)

    def _rank_problems(self, config: LoraConfig, model: ModelFacts) -> list[Problem]:
        """A rank above that of every module's whole weight: it costs memory and can learn nothing more."""
        if not model.known:
            return []
        modules = [module for module in self._wrapped(config, model) if len(module.shape) == 2]
        full = max((min(module.shape) for module in modules), default=0)
        if not modules or any(self._rank(config, module) <= min(module.shape) for module in modules):
            return []
        why = f"a change of rank {full} already reaches every weight of the chosen modules of {model.source}"
        return [Problem("r", f"r: {config.r} is more than any module has", why, f"r: {full} or less; 8 to 64 is usual")]

    def _wrapped(self, config: LoraConfig, model: ModelFacts) -> tuple[ModuleFact, ...]:
        try:
            return self.resolve(config, model).modules
        except CompatibilityError:  # the modules themselves are refused, by the caller
            return ()

    def merge_options(self, layer: Any, name: str, module: str) -> dict[str, Any]:
        if name not in getattr(layer, "r", {}):
            return {}
        return {
            "r": layer.r[name],
            "lora_alpha": layer.lora_alpha[name],
            "rank_pattern": {},
            "alpha_pattern": {},
            "layers_to_transform": None,
            "layers_pattern": None,
            "trainable_token_indices": None,
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
        }

    def accept_saved(self, config: peft.LoraConfig) -> str:
        init = config.init_lora_weights
        if isinstance(init, str) and init.startswith(_BASE_CHANGING):
            return f"it was initialised by {init}, which changed the weights of its base"
        for key in REFUSED:
            value = getattr(config, key, None)
            if value and key not in _HARMLESS_WHEN_SAVED:
                return f"it uses {key}: {REFUSED[key]}"
        config.init_lora_weights = True  # the values come from the file: nothing costly is to be computed first
        return ""

    @staticmethod
    def _rank(config: LoraConfig, module: ModuleFact) -> int:
        """By peft's rule: the first pattern that is, or ends, the module's name."""
        for pattern, rank in (config.rank_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module.name):
                return rank
        return config.r


# Options that a plain PEFT adapter may have, and that loading, training and merging take as they are.
_HARMLESS_WHEN_SAVED = frozenset(
    {"fan_in_fan_out", "trainable_token_indices", "megatron_core", "qalora_group_size", "runtime_config"}
)


def _default_targets(model: ModelFacts) -> str | list[str]:
    names = peft_mapping(_MAPPING).get(model.model_type)
    if names is None or not model.matching(names):
        return ALL_LINEAR
    return names if isinstance(names, str) else list(names)
