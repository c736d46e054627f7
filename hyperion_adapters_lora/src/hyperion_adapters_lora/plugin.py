"""LoRA as a plugin: what its config means, what it costs, and how peft is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, Problem
from hyperion_core.facts import (
    Capabilities,
    Cost,
    ModelFacts,
    ModuleFact,
    ParamGroup,
    Provides,
    Recommendation,
    Workload,
)
from hyperion_core.quiet import ON_IMPORT, errors_only

from hyperion_peft import ALL_LINEAR, PeftAdapter, Selection, Targets, peft_mapping
from hyperion_peft.cost import BYTES, fp32_copy, width

from . import recommended
from .config import REFUSED, LoraConfig

if TYPE_CHECKING:
    import peft
    from torch import Tensor
    from torch.nn import Module

    from .start import Start

Number = TypeVar("Number", int, float)
_MAPPING = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
_BASE_CHANGING = ("pissa", "olora", "loftq", "lora_ga", "corda")
_OURS = ("type", "init_rows", "loraplus_lr_ratio")  # options that PEFT does not know


class LoraAdapter(PeftAdapter):
    """Low-rank adapters. Left out, target_modules is PEFT's choice for the architecture, or all linear modules.

    An initialisation with an offset (see `offset`) is an adapter of rank 2r to PEFT. What `adapter_prepare` computes
    waits in the instance for `adapter_apply`.
    """

    config_class = LoraConfig
    capabilities = Capabilities(mergeable=True, new_tokens=True)
    peft_type = "LORA"
    wraps = frozenset({"linear", "embedding"})
    scales = True

    def __init__(self) -> None:
        self._prepared: tuple[LoraConfig, dict[str, Start]] | None = None

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

        options = {key: value for key, value in config.given().items() if key not in _OURS}
        options["target_modules"] = targets.names
        options["modules_to_save"] = list(targets.saved_paths) or None
        options["task_type"] = config.task_type
        options["trainable_token_indices"] = dict(tokens) or None
        if targets.selection.target_modules == ALL_LINEAR:
            for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
                options.pop(key, None)  # the names above are what is left
        for key in ("rank_pattern", "alpha_pattern"):
            options[key] = options.get(key) or {}
        if config.init_source:
            options["init_lora_weights"] = True  # the values are ours, and come afterwards
        if config.has_offset:
            options |= self._doubled(config, targets)
        return peft.LoraConfig(**options)

    def _doubled(self, config: LoraConfig, targets: Targets) -> dict[str, Any]:
        """Twice the rank, with the scaling of the rank that was asked for; embeddings stay as they are."""
        factor = math.sqrt(2) if config.use_rslora else 2
        plain = [module for module in targets.modules if module.kind == "embedding"]
        ranks = {module.name: self._rank(config, module) for module in plain}
        alphas = {module.name: self._alpha(config, module) for module in plain}
        return {
            "r": 2 * config.r,
            "lora_alpha": factor * config.lora_alpha,
            "rank_pattern": _before(ranks, config.rank_pattern, 2),
            "alpha_pattern": _before(alphas, config.alpha_pattern, factor),
        }

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
        """All but what `_between` counts."""
        out, into = (module.shape[1], 0) if module.kind == "embedding" else module.shape
        if not self._by_peft(config, module):
            return float(into) if config.lora_dropout else 0.0  # a mask of one byte a number, see fast_linear
        kept: float = fp32_copy([into], work)
        if config.lora_dropout:
            kept += 2 * BYTES * into  # the mask, which is float32, and the input that it leaves
        if config.use_dora:
            kept += (BYTES + width(work)) * out  # the outputs of the base and of the update, which it scales
            if config.lora_dropout and work.dtype != "float32":  # the base computes again, on what dropout leaves
                kept += BYTES * out * into / (work.batch * work.length)
        return kept

    def further_cost(self, config: LoraConfig, targets: Targets, work: Workload) -> Cost:
        # DoRA builds the whole updated weight of one module at a time, to take its norm.
        whole = max((m.shape[0] * m.shape[1] for m in targets.modules), default=0) if config.use_dora else 0
        cost = Cost({"activations": self._between(config, targets, work) + BYTES * whole})
        frozen = self._in_offset(config, targets)
        return cost + Cost({"weights": BYTES * frozen}, disk=BYTES * frozen, flops=6.0 * frozen) if frozen else cost

    def _between(self, config: LoraConfig, targets: Targets, work: Workload) -> int:
        """Bytes of the numbers between A and B, of A and B in the activations' type, or stacked with an offset, and of
        three vectors around DoRA's magnitude. They are few, and counted whole where layers compute again, too."""
        found, tokens = 0, work.batch * work.length
        for module in targets.modules:
            offset = self._has_offset(config, module)
            rank = self._rank(config, module) * (1 + offset)
            if self._by_peft(config, module):
                found += BYTES * rank * (tokens + (sum(module.shape) if offset else 0))
            else:
                found += width(work) * rank * (tokens + sum(module.shape))
            if config.use_dora:
                found += 3 * BYTES * module.shape[module.kind == "embedding"]
        return found

    @staticmethod
    def _by_peft(config: LoraConfig, module: ModuleFact) -> bool:
        """Whether PEFT's own code computes it, in float32 and without copies of A and B: see fast_linear."""
        return config.use_dora or config.lora_bias or module.kind == "embedding"

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
        return self._rank_problems(config, model) or self._start_problems(config, model)

    def _start_problems(self, config: LoraConfig, model: ModelFacts) -> list[Problem]:
        """A matrix has no more singular vectors than its shorter side is long."""
        if config.init_source is None or not model.known:
            return []
        init = f'init_lora_weights "{config.init_lora_weights}"'
        linear = [module for module in self._wrapped(config, model) if module.kind == "linear"]
        times = 2 if config.init_source == "gradients" else 1
        wanted = {module: times * self._rank(config, module) for module in linear}
        short = [m for m in linear if wanted[m] > (m.shape[1] if config.init_source == "activations" else min(m.shape))]
        if not short:
            return []
        module = short[0]
        return [
            Problem(
                "r",
                f"{init} needs a smaller rank in {module.name}",
                f"it takes {wanted[module]} directions at rank {self._rank(config, module)}, and the module, "
                f"{module.shape[0]}×{module.shape[1]}, does not have so many",
                "lower r, or the module's rank in rank_pattern, or leave the module out",
            )
        ]

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

    def adapter_recommend(self, config: LoraConfig, model: ModelFacts, quantizer: Provides | None) -> Recommendation:
        """The table of `recommended`, without what this base is too small for."""
        options = recommended.options_for(config, model)
        if self.further_problems(LoraConfig.parse({**config.given(), **options}), model, quantizer):
            options = recommended.options_for(config, model, rank=False)
        return Recommendation(options, recommended.training_for(model), recommended.BASIS)

    # --- the start ---

    def adapter_prepare(
        self, config: LoraConfig, model: Module, batches: Iterable[Mapping[str, Tensor]], ctx: RunContext
    ) -> LoraConfig | None:
        """EVA and LoRA-GA look at the data; the others need none."""
        if config.init_source not in ("activations", "gradients"):
            return None
        with errors_only(*ON_IMPORT):
            from hyperion_peft.attach import facts_of

            from .initialising import from_data

        facts = facts_of(model)
        problems = self.further_problems(config, facts, None)
        if problems:
            raise CompatibilityError(problems[0].what, why=problems[0].why, fix=problems[0].fix)
        linear = [module for module in self.resolve(config, facts).modules if module.kind == "linear"]
        ranks = {module.name: self._rank(config, module) for module in linear}
        self._prepared = config, from_data(model, config, ranks, linear, batches, ctx)
        return config

    def starts(self, model: Module, config: LoraConfig, targets: Targets, ctx: RunContext) -> dict[str, Start]:
        if config.init_source is None:
            return {}
        if config.init_source == "weights":
            from .initialising import from_weights

            linear = [module for module in targets.modules if module.kind == "linear"]
            wanted = {m.name: (self._rank(config, m), self._scaling(config, m)) for m in linear}
            return from_weights(model, config, wanted, ctx)
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0] != config:
            raise CompatibilityError(
                f'an adapter that starts by "{config.init_lora_weights}" cannot be attached without data',
                why="adapter_prepare was not called with this config before adapter_apply",
                fix='call it, or choose an initialisation that needs no data, such as "pissa"',
            )
        return prepared[1]

    def begin(self, model: Module, name: str, starts: Mapping[str, Start]) -> None:
        from .offset import begin

        begin(model, name, starts)

    # --- training, files ---

    def adapter_param_groups(self, model: Module, name: str, config: Any) -> list[ParamGroup]:
        """One group; with LoRA+ (Hayou et al. 2024, arXiv:2402.12354) a second one of B, and, as in PEFT's helper, of
        all that is one-dimensional. LoRA of an embedding keeps the run's learning rate."""
        groups = super().adapter_param_groups(model, name, config)
        ratio = config.loraplus_lr_ratio or 1.0
        if ratio == 1.0 or not groups:
            return groups
        parameters = groups[0].parameters
        fast = [pair for pair in parameters if ".lora_B." in pair[0] or pair[1].ndim == 1]
        slow = [pair for pair in parameters if not (".lora_B." in pair[0] or pair[1].ndim == 1)]
        both = ParamGroup(name, tuple(slow)), ParamGroup(f"{name}.B", tuple(fast), lr_ratio=ratio)
        return [group for group in both if group.parameters]

    def adapter_save(self, model: Module, name: str, config: Any, folder: Path, for_resume: bool) -> list[Path]:
        """PEFT's two files. With an offset, an ordinary LoRA of rank 2r; to resume, with what is trained in its first
        half and what is frozen in its second."""
        from hyperion_peft import files

        from . import offset

        halves = offset.halves(model, name) if for_resume else {}
        return files.save(model, name, Path(folder), halves, {offset.MARK: "halves"} if halves else {})

    def adapter_load(self, model: Module, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Module:
        """Attach a saved one; what was saved to resume, with an offset, has it again."""
        model = super().adapter_load(model, name, folder, trainable, ctx)
        from hyperion_peft import files

        from . import offset

        if offset.MARK in files.read_marks(Path(folder)):
            offset.go_on(model, name)
        return model

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

    def _in_offset(self, config: LoraConfig, targets: Targets) -> int:
        """Numbers in all frozen copies."""
        return sum(self._rank(config, m) * sum(m.shape) for m in targets.modules if self._has_offset(config, m))

    @staticmethod
    def _has_offset(config: LoraConfig, module: ModuleFact) -> bool:
        return config.has_offset and module.kind == "linear"

    def _scaling(self, config: LoraConfig, module: ModuleFact) -> float:
        rank = self._rank(config, module)
        return self._alpha(config, module) / (math.sqrt(rank) if config.use_rslora else rank)

    def _alpha(self, config: LoraConfig, module: ModuleFact) -> float:
        return _by_pattern(config.alpha_pattern, module, config.lora_alpha)

    @staticmethod
    def _rank(config: LoraConfig, module: ModuleFact) -> int:
        return _by_pattern(config.rank_pattern, module, config.r)


def _before(own: Mapping[str, Any], patterns: Mapping[str, Any] | None, factor: float) -> dict[str, Any]:
    """`own` first, since the first pattern that fits counts, and then the others times `factor`."""
    return {**own, **{name: factor * value for name, value in (patterns or {}).items() if name not in own}}


def _by_pattern(patterns: Mapping[str, Number] | None, module: ModuleFact, default: Number) -> Number:
    """By peft's rule: the first pattern that is, or ends, the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module.name):
            return value
    return default


# Options that a plain PEFT adapter may have, and that loading, training and merging take as they are.
_HARMLESS_WHEN_SAVED = frozenset(
    {"fan_in_fan_out", "trainable_token_indices", "megatron_core", "qalora_group_size", "runtime_config"}
)


def _default_targets(model: ModelFacts) -> str | list[str]:
    names = peft_mapping(_MAPPING).get(model.model_type)
    if names is None or not model.matching(names):
        return ALL_LINEAR
    return names if isinstance(names, str) else list(names)
