"""The adapter hooks over PEFT, for every method that wraps layers of the base. Importing this imports neither."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hyperion_core.config import AdapterConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import ArtifactError, CompatibilityError, HyperionError, Problem
from hyperion_core.facts import Cost, ModelFacts, ModuleFact, ParamGroup, Provides, Workload, is_output_head
from hyperion_core.kinds import Adapter
from hyperion_core.quiet import ON_IMPORT, errors_only

from .targets import ALL_LINEAR, Selection, compact, saved_modules, saved_paths, select, selection_problems

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True, slots=True)
class Targets:
    """What a config means on one base: `modules` are wrapped, `saved` trained in full (and called `saved_paths`).

    `names` is what peft is given as target_modules: the config's own, or for "all-linear" the names that it means, so
    that quantized modules count as linear too.
    """

    selection: Selection
    names: str | list[str]
    modules: tuple[ModuleFact, ...]
    saved: tuple[ModuleFact, ...]
    saved_paths: tuple[str, ...]


class PeftAdapter(ABC, Adapter):
    """Base of adapters that run on PEFT. A plugin says how its config reads, and what one module costs.

    A derived class sets `peft_type` and `wraps`, and writes `selection`, `peft_config`, `parameters_of` and
    `kept_of`; the hooks are here.
    """

    peft_type: ClassVar[str]
    wraps: ClassVar[frozenset[str]] = frozenset({"linear"})
    scales: ClassVar[bool] = False

    # --- what a method says of itself ---

    @abstractmethod
    def selection(self, config: Any, model: ModelFacts) -> Selection:
        """The modules that `config` means on a known base, defaults filled in; torch-free."""

    @abstractmethod
    def peft_config(self, config: Any, targets: Targets, tokens: Mapping[str, list[int]]) -> PeftConfig:
        """The config that peft is given. `tokens` are rows to train, by the embedding's name."""

    @abstractmethod
    def parameters_of(self, config: Any, module: ModuleFact, targets: Targets) -> int:
        """Trainable parameters that the method adds to one wrapped module."""

    @abstractmethod
    def kept_of(self, config: Any, module: ModuleFact, targets: Targets, work: Workload) -> float:
        """Bytes a token that autograd keeps for one wrapped module, beside its input, which the framework counts."""

    def further_parameters(self, config: Any, model: ModelFacts, targets: Targets) -> int:
        """Trainable parameters outside the wrapped modules, whole modules aside."""
        return 0

    def further_cost(self, config: Any, targets: Targets, work: Workload) -> Cost:
        """What the method takes beside its trainable parameters and what `kept_of` says."""
        return Cost()

    def further_problems(self, config: Any, model: ModelFacts, quantizer: Provides | None) -> list[Problem]:
        """What else stands against a config; the base may be unknown."""
        return []

    def starts(self, model: Module, config: Any, targets: Targets, ctx: RunContext) -> Mapping[str, Any]:
        """First values that the method itself computes, before anything is attached, by names of wrapped modules."""
        return {}

    def begin(self, model: Module, name: str, starts: Mapping[str, Any]) -> None:
        """Put what `starts` gave, which is not empty, into the attached adapter."""

    def merge_options(self, layer: Any, name: str, module: str) -> dict[str, Any]:
        """Fields of the peft config under which one wrapped layer is merged alone, called `module` there."""
        return {}

    def accept_saved(self, config: Any) -> str:
        """Make a saved peft config fit for loading; gives the reason where it cannot be, or ""."""
        return ""

    # --- hooks ---

    def adapter_check(self, config: AdapterConfig, model: ModelFacts, quantizer: Provides | None) -> list[Problem]:
        problems = self.further_problems(config, model, quantizer)
        if model.known:
            try:
                problems += selection_problems(self.selection(config, model), model, self.wraps)
            except CompatibilityError as error:
                problems.append(Problem("target_modules", error.what, error.why, error.fix))
        return problems

    def adapter_targets(self, config: AdapterConfig, model: ModelFacts) -> list[str]:
        """Wrapped modules, then those that are trained in full. Empty while the base is unknown."""
        if not model.known:
            return []
        targets = self.resolve(config, model)
        return [module.name for module in (*targets.modules, *targets.saved)]

    def adapter_estimate(self, config: AdapterConfig, model: ModelFacts, work: Workload) -> Cost:
        from .cost import adapter_cost, fp32_copy

        if not model.known:
            return Cost()
        targets = self.resolve(config, model)
        own = sum(self.parameters_of(config, module, targets) for module in targets.modules)
        whole = sum(module.parameters for module in targets.saved)
        kept = {module.name: self.kept_of(config, module, targets, work) for module in targets.modules}
        kept |= {module.name: fp32_copy(module.shape[1:], work) for module in targets.saved if module.kind == "linear"}
        total = own + whole + self.further_parameters(config, model, targets)
        return adapter_cost(total, kept, work) + self.further_cost(config, targets, work)

    def adapter_apply(self, model: Module, name: str, config: AdapterConfig, ctx: RunContext) -> Module:
        """Attach one; it alone trains and is in force afterwards."""
        with errors_only(*ON_IMPORT):
            from . import attach, files

        facts = attach.facts_of(model)
        problems = self.further_problems(config, facts, None)
        if problems:
            raise CompatibilityError(problems[0].what, why=problems[0].why, fix=problems[0].fix)
        tokens, targets = self._token_rows(model, ctx.new_token_ids, facts), self.resolve(config, facts)
        starts = self.starts(model, config, targets, ctx)
        peft_config = self.peft_config(config, targets, tokens)
        peft_config.base_model_name_or_path = files.public_base_name(ctx.plan.config, attach.base_of(model))
        model = attach.attach(model, name, peft_config, ctx.seed)
        if starts:
            self.begin(model, name, starts)
        return model

    def adapter_param_groups(self, model: Module, name: str, config: AdapterConfig) -> list[ParamGroup]:
        from .attach import declared

        trained = [(t.name, t.parameter) for t in declared(model, name) if t.parameter.requires_grad]
        return [ParamGroup(name, tuple(trained))] if trained else []

    def adapter_activate(self, model: Module, weights: Mapping[str, float]) -> None:
        from .attach import activate

        activate(model, weights, scales=self.scales)

    def adapter_save(
        self, model: Module, name: str, config: AdapterConfig, folder: Path, for_resume: bool
    ) -> list[Path]:
        """PEFT's two files, in `folder` itself whatever `name` is."""
        from .files import save

        return save(model, name, Path(folder))

    def adapter_load(self, model: Module, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Module:
        """Attach a saved one; a model that it does not fit stays as it was."""
        with errors_only(*ON_IMPORT):
            from . import attach, files

        folder = Path(folder)
        saved = files.read_config(folder, self.peft_type)
        why = self.accept_saved(saved)
        if why:
            raise ArtifactError(f"the adapter in {folder} cannot be loaded", why=why, fix="load it with plain peft")
        tensors = files.read_tensors(folder)
        base = saved.base_model_name_or_path
        saved.inference_mode = False
        try:
            model = attach.attach(model, name, saved, ctx.seed)
        except CompatibilityError as error:
            raise ArtifactError(
                f"the adapter in {folder} does not fit this base",
                why=f"{error.what}: {error.why}",
                fix=f"load it on the base that it was trained on: {base}" if base else error.fix,
            ) from error
        try:
            files.fill(model, name, tensors, folder)
        except HyperionError:
            attach.detach(model, name)
            raise
        if not trainable:
            attach.train_only(model, None)
        return model

    def adapter_unload(self, model: Module, name: str) -> Module:
        from .attach import detach

        return detach(model, name)

    def adapter_merge_weight(
        self, model: Module, name: str, module: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        from . import attach, merge

        layer = dict(attach.base_of(model).named_modules()).get(module)
        return merge.merged(model, name, module, weight, bias, self.merge_options(layer, name, merge.ONLY))

    # --- shared ---

    def resolve(self, config: Any, model: ModelFacts) -> Targets:
        """What `config` means on a known base.

        Raises:
            CompatibilityError: nothing that exists, or nothing that the method can wrap.
        """
        selection = self.selection(config, model)
        modules = select(selection, model, self.wraps)
        given = selection.target_modules
        return Targets(
            selection=selection,
            names=compact((m.name for m in modules), model) if given == ALL_LINEAR else _plain(given),
            modules=tuple(modules),
            saved=tuple(saved_modules(selection.modules_to_save, model)),
            saved_paths=tuple(saved_paths(selection.modules_to_save, model)),
        )

    def _token_rows(self, model: Module, ids: tuple[int, ...], facts: ModelFacts) -> dict[str, list[int]]:
        """Rows to train by the name of the embedding, and of the output head where it has rows of its own."""
        if not ids:
            return {}
        if not self.capabilities.new_tokens:
            raise CompatibilityError(
                f"{type(self).__name__} cannot train new tokens",
                why="peft has no such option for this method",
                fix="leave out new_tokens, or choose another adapter",
            )
        embeddings = [m.name for m in facts.modules if m.kind == "embedding" and m.shape[0] > max(ids)]
        heads = [m.name for m in facts.modules if is_output_head(m.name) and not facts.tied_embeddings]
        if not embeddings:
            raise CompatibilityError(
                "the base has no rows for the new tokens",
                why=f"they are {', '.join(map(str, ids[:5]))}, and no embedding is that long",
                fix="resize the embeddings before the adapter is attached",
            )
        return {name: list(ids) for name in (embeddings[0], *heads)}


def _plain(names: str | Sequence[str]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)
