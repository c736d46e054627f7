"""(IA)³ as a plugin: what its config means, what it costs, and how peft is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import Capabilities, ModelFacts, ModuleFact, Workload

from hyperion_peft import PeftAdapter, Selection, Targets, compact, peft_mapping
from hyperion_peft.cost import BYTES, fp32_copy

from .config import IA3Config
from .structure import attention_modules, feedforward_modules

if TYPE_CHECKING:
    import peft

_MAPPING = "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"


@dataclass(frozen=True, slots=True)
class IA3Targets(Targets):
    """`feedforward` are the modules whose input is scaled, `feedforward_names` what peft is told of them."""

    feedforward: frozenset[str]
    feedforward_names: tuple[str, ...]


class IA3Adapter(PeftAdapter):
    """Learnt factors. Left out, the modules are found by structure, and by PEFT's tables where that finds nothing."""

    config_class = IA3Config
    capabilities = Capabilities(mergeable=True)
    peft_type = "IA3"
    wraps = frozenset({"linear"})

    def selection(self, config: IA3Config, model: ModelFacts) -> Selection:
        return Selection(
            target_modules=config.target_modules or _default_targets(model),
            exclude_modules=config.exclude_modules,
            modules_to_save=config.modules_to_save,
        )

    def resolve(self, config: Any, model: ModelFacts) -> IA3Targets:
        targets = super().resolve(config, model)
        inner = self._feedforward(config, model, targets.modules)
        outer = [module.name for module in targets.modules if module.name not in inner]
        inner_names = compact(inner, model)
        return IA3Targets(
            selection=targets.selection,
            # Spelt out: peft takes any module whose name ends in a feed-forward name for one.
            names=compact(outer, model) + inner_names,
            modules=targets.modules,
            saved=targets.saved,
            saved_paths=targets.saved_paths,
            feedforward=frozenset(inner),
            feedforward_names=tuple(inner_names),
        )

    def peft_config(self, config: IA3Config, targets: Targets, tokens: Mapping[str, list[int]]) -> peft.IA3Config:
        import peft

        assert isinstance(targets, IA3Targets)
        return peft.IA3Config(
            target_modules=list(targets.names),
            feedforward_modules=list(targets.feedforward_names),
            modules_to_save=list(targets.saved_paths) or None,
            init_ia3_weights=config.init_ia3_weights,
            task_type=config.task_type,
        )

    def parameters_of(self, config: IA3Config, module: ModuleFact, targets: Targets) -> int:
        assert isinstance(targets, IA3Targets)
        return module.shape[1] if module.name in targets.feedforward else module.shape[0]

    def kept_of(self, config: IA3Config, module: ModuleFact, targets: Targets, work: Workload) -> float:
        # What the factors are multiplied with is kept, in fp32, for their gradient: the output, or the input.
        assert isinstance(targets, IA3Targets)
        out, into = module.shape
        return fp32_copy([into], work) if module.name in targets.feedforward else BYTES * out

    def merge_options(self, layer: Any, name: str, module: str) -> dict[str, Any]:
        feedforward = [module] if getattr(layer, "is_feedforward", False) else []
        return {"feedforward_modules": feedforward, "init_ia3_weights": True, "fan_in_fan_out": False}

    def _feedforward(self, config: IA3Config, model: ModelFacts, modules: tuple[ModuleFact, ...]) -> set[str]:
        if config.feedforward_modules is not None:
            named = {module.name for module in model.matching(config.feedforward_modules)}
            return {module.name for module in modules if module.name in named}
        return {module.name for module in feedforward_modules(model, modules)}


def _default_targets(model: ModelFacts) -> list[str]:
    """By structure; by peft's table for the architecture where structure does not show both kinds.

    Raises:
        CompatibilityError: neither knows.
    """
    attention, inner = attention_modules(model), feedforward_modules(model)
    if attention and inner:
        return compact([module.name for module in (*attention, *inner)], model)
    table = peft_mapping(_MAPPING).get(model.model_type)
    if table is not None and model.matching(table):
        return list(table)
    raise CompatibilityError(
        f"keys, values and feed-forward modules of {model.source} are not known",
        why=f"neither its modules' names and shapes nor peft's table for {model.model_type or 'its architecture'!r}"
        f" show them; its modules are called {', '.join(model.short_names())}",
        fix="name them: target_modules, and feedforward_modules for those whose input is to be scaled",
    )
