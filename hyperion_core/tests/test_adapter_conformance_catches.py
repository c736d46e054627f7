"""The adapter suite passes an honest adapter, written on the contract alone, and names the fault of a broken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hyperion_core.artifact import read_json, write_json
from hyperion_core.config import AdapterConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import ArtifactError, Problem
from hyperion_core.facts import Capabilities, Cost, ModelFacts, ParamGroup, Recommendation
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Adapter
from hyperion_core.registry import Registry
from hyperion_core.testing import AdapterConformance
from hyperion_core.testing.adapters import NAME, context

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


class ScaleConfig(AdapterConfig):
    """One factor for each output of the wrapped modules."""

    type: str = "scale"
    target: str = "down_proj"


class Scaled(torch.nn.Module):
    """A linear module whose outputs are multiplied by the factors of the active adapters."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.factors = torch.nn.ParameterDict()
        self.active: list[str] = []

    def forward(self, x: Any) -> Any:
        y = self.inner(x)
        for name in self.active:
            if name in self.factors:
                y = y * self.factors[name]
        return y


class ScaleAdapter(Adapter):
    """Honest. The broken ones below each change one thing."""

    config_class = ScaleConfig
    capabilities = Capabilities(mergeable=True)

    def adapter_targets(self, config: Any, model: ModelFacts) -> list[str]:
        return [module.name for module in model.matching([config.target])]

    def adapter_estimate(self, config: Any, model: ModelFacts) -> Cost:
        return Cost({"adapter": 4 * sum(module.shape[0] for module in model.matching([config.target]))})

    def adapter_apply(self, model: Any, name: str, config: Any, ctx: RunContext) -> Any:
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(ctx.seed)
        for path, module in list(model.named_modules()):
            if path.endswith(f".{config.target}"):
                wrapped = module if isinstance(module, Scaled) else self._wrap(model, path, module)
                start = 1 + 0.01 * torch.randn(wrapped.inner.out_features, generator=generator)
                wrapped.factors[name] = torch.nn.Parameter(start)
        self.adapter_activate(model, {name: 1.0})
        return model

    def adapter_param_groups(self, model: Any, name: str, config: Any) -> list[ParamGroup]:
        found = [(f"{path}.factors.{name}", m.factors[name]) for path, m in scaled(model) if name in m.factors]
        return [ParamGroup(name, tuple((n, p) for n, p in found if p.requires_grad))]

    def adapter_activate(self, model: Any, weights: Any) -> None:
        for _, module in scaled(model):
            module.active = list(weights)

    def adapter_save(self, model: Any, name: str, config: Any, folder: Path) -> list[Path]:
        from safetensors.torch import save_file

        tensors = {path: module.factors[name].detach() for path, module in scaled(model) if name in module.factors}
        save_file(tensors, folder / "scale.safetensors")
        return [folder / "scale.safetensors", write_json(folder / "scale.json", {"target": config.target})]

    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        from safetensors.torch import load_file

        tensors = load_file(folder / "scale.safetensors")
        for path, value in tensors.items():
            if model.get_submodule(path).out_features != value.numel():
                raise ArtifactError(f"{path} has another size on this base")
        model = self.adapter_apply(model, name, ScaleConfig(target=read_json(folder / "scale.json")["target"]), ctx)
        with torch.no_grad():
            for path, value in tensors.items():
                model.get_submodule(path).factors[name].copy_(value)
                model.get_submodule(path).factors[name].requires_grad_(trainable)
        return model

    def adapter_unload(self, model: Any, name: str) -> Any:
        for path, module in scaled(model):
            del module.factors[name]
            if not module.factors:
                self._put(model, path, module.inner)
        return model

    def adapter_merge_weight(self, model: Any, name: str, module: str, weight: Any, bias: Any) -> tuple[Any, Any]:
        return weight * model.get_submodule(module).factors[name].detach()[:, None], bias

    def _wrap(self, model: Any, path: str, module: Any) -> Scaled:
        wrapped = Scaled(module)
        self._put(model, path, wrapped)
        return wrapped

    def _put(self, model: Any, path: str, module: Any) -> None:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def scaled(model: Any) -> list[tuple[str, Scaled]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Scaled)]


class TestAnHonestAdapter(AdapterConformance):
    plugin = "scale"

    @pytest.fixture(autouse=True)
    def _registered(self, registry: Registry) -> None:
        registry.add(ScaleAdapter, "scale")


class TrainsTheBase(ScaleAdapter):
    def adapter_apply(self, model: Any, name: str, config: Any, ctx: RunContext) -> Any:
        model = super().adapter_apply(model, name, config, ctx)
        model.lm_head.requires_grad_(True)
        return model


class ClaimsTheBase(ScaleAdapter):
    """Declares a parameter of the base as its own."""

    def adapter_param_groups(self, model: Any, name: str, config: Any) -> list[ParamGroup]:
        (group,) = super().adapter_param_groups(model, name, config)
        model.lm_head.weight.requires_grad_(True)
        return [ParamGroup(name, (*group.parameters, ("lm_head.weight", model.lm_head.weight)))]


class SavesTooMuch(ScaleAdapter):
    def adapter_save(self, model: Any, name: str, config: Any, folder: Path) -> list[Path]:
        from safetensors.torch import save_file

        save_file({"lm_head": model.lm_head.weight.detach()}, folder / "more.safetensors")
        return [*super().adapter_save(model, name, config, folder), folder / "more.safetensors"]


class SavesTooLittle(ScaleAdapter):
    def adapter_save(self, model: Any, name: str, config: Any, folder: Path) -> list[Path]:
        from safetensors.torch import load_file, save_file

        paths = super().adapter_save(model, name, config, folder)
        tensors = load_file(paths[0])
        tensors.pop(min(tensors))
        save_file(tensors, paths[0])
        return paths


class TrainsInTheBasesType(ScaleAdapter):
    def adapter_apply(self, model: Any, name: str, config: Any, ctx: RunContext) -> Any:
        model = super().adapter_apply(model, name, config, ctx)
        for _, module in scaled(model):
            module.factors[name].data = module.factors[name].data.to(module.inner.weight.dtype)
        return model


class LoadsInTheBasesType(ScaleAdapter):
    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        model = super().adapter_load(model, name, folder, trainable, ctx)
        for _, module in scaled(model):
            module.factors[name].data = module.factors[name].data.to(module.inner.weight.dtype)
        return model


class LeavesAChange(ScaleAdapter):
    def adapter_unload(self, model: Any, name: str) -> Any:
        for path, module in scaled(model):
            with torch.no_grad():
                module.inner.weight.mul_(module.factors[name].detach()[:, None])
                module.inner.weight.div_(module.factors[name].detach()[:, None])  # equal but for rounding
            self._put(model, path, module.inner)
        return model


class MergesTwice(ScaleAdapter):
    def adapter_merge_weight(self, model: Any, name: str, module: str, weight: Any, bias: Any) -> tuple[Any, Any]:
        once, bias = super().adapter_merge_weight(model, name, module, weight, bias)
        return super().adapter_merge_weight(model, name, module, once, bias)


class IgnoresTheSeed(ScaleAdapter):
    def adapter_apply(self, model: Any, name: str, config: Any, ctx: RunContext) -> Any:
        model = super().adapter_apply(model, name, config, ctx)
        state = torch.get_rng_state()
        with torch.no_grad():
            for _, module in scaled(model):
                module.factors[name].add_(torch.randn_like(module.factors[name]) * 0.01)
        torch.set_rng_state(state)
        return model


class DisturbsTheRandomState(ScaleAdapter):
    def adapter_apply(self, model: Any, name: str, config: Any, ctx: RunContext) -> Any:
        torch.manual_seed(ctx.seed)
        return super().adapter_apply(model, name, config, ctx)


class StaysActive(ScaleAdapter):
    def adapter_activate(self, model: Any, weights: Any) -> None:
        if weights:
            super().adapter_activate(model, weights)


class ForgetsTheFirst(ScaleAdapter):
    def adapter_apply(self, model: Any, name: str, config: Any, ctx: RunContext) -> Any:
        model = super().adapter_apply(model, name, config, ctx)
        for _, module in scaled(model):
            for other in module.factors:
                module.factors[other].requires_grad_(True)
        return model


class UnderestimatesItself(ScaleAdapter):
    def adapter_estimate(self, config: Any, model: ModelFacts) -> Cost:
        return Cost({"adapter": super().adapter_estimate(config, model).memory["adapter"] // 2})


class LoadsAnything(ScaleAdapter):
    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        model = self.adapter_apply(model, name, ScaleConfig(), ctx)
        self.adapter_activate(model, {})
        return model


class InventsModules(ScaleAdapter):
    def adapter_targets(self, config: Any, model: ModelFacts) -> list[str]:
        return [*super().adapter_targets(config, model), "model.layers.9.mlp.down_proj"]


class NamesAModuleTwice(ScaleAdapter):
    def adapter_targets(self, config: Any, model: ModelFacts) -> list[str]:
        return super().adapter_targets(config, model) * 2


class NamesNothing(ScaleAdapter):
    def adapter_targets(self, config: Any, model: ModelFacts) -> list[str]:
        return []


class RefusesTheBase(ScaleAdapter):
    def adapter_check(self) -> list[Problem]:
        return [Problem("target", "not on this base")]


class BlamesAnUnknownBase(ScaleAdapter):
    def adapter_check(self, model: ModelFacts) -> list[Problem]:
        return [] if model.known else [Problem("target", "matches no module")]


class NeedsNonsense(ScaleAdapter):
    capabilities = Capabilities(mergeable=True, needs=frozenset({"forward", "dequantise"}))


class RecommendsWhatItDoesNotKnow(ScaleAdapter):
    def adapter_recommend(self) -> Recommendation:
        return Recommendation({"tragets": "up_proj"})


class RecommendsWhatItRefuses(ScaleAdapter):
    def adapter_recommend(self) -> Recommendation:
        return Recommendation({"target": "up_proj"})

    def adapter_check(self, config: Any) -> list[Problem]:
        return [Problem("target", "not on this base")] if config.target == "up_proj" else []


class DeclaresTwice(ScaleAdapter):
    def adapter_param_groups(self, model: Any, name: str, config: Any) -> list[ParamGroup]:
        return super().adapter_param_groups(model, name, config) * 2


class DeclaresTheBase(ScaleAdapter):
    def adapter_param_groups(self, model: Any, name: str, config: Any) -> list[ParamGroup]:
        frozen = ParamGroup("base", (("lm_head.weight", model.lm_head.weight),))
        return [*super().adapter_param_groups(model, name, config), frozen]


class DeclaresInAnyOrder(ScaleAdapter):
    calls = 0

    def adapter_param_groups(self, model: Any, name: str, config: Any) -> list[ParamGroup]:
        self.calls += 1
        (group,) = super().adapter_param_groups(model, name, config)
        return [ParamGroup(name, group.parameters[:: (-1) ** self.calls])]


class LearnsBackwards(ScaleAdapter):
    def adapter_after_step(self, model: Any, name: str, step: int, total: int) -> None:
        with torch.no_grad():
            for _, module in scaled(model):
                module.factors[name].fill_(20.0 * step)


class ComesBackWeaker(ScaleAdapter):
    def adapter_activate(self, model: Any, weights: Any) -> None:
        for _, module in scaled(model):
            if weights and not module.active:
                module.factors[NAME].data.mul_(0.9)
        super().adapter_activate(model, weights)


class AlwaysTrains(ScaleAdapter):
    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        return super().adapter_load(model, name, folder, True, ctx)


class SavesUnannounced(ScaleAdapter):
    def adapter_save(self, model: Any, name: str, config: Any, folder: Path) -> list[Path]:
        return super().adapter_save(model, name, config, folder)[:1]


class SavesPickles(ScaleAdapter):
    def adapter_save(self, model: Any, name: str, config: Any, folder: Path) -> list[Path]:
        torch.save({}, folder / "adapter.bin")
        return [*super().adapter_save(model, name, config, folder), folder / "adapter.bin"]


class ChangesWhatItRefuses(ScaleAdapter):
    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        model.lm_head.weight.data.mul_(2)
        return super().adapter_load(model, name, folder, trainable, ctx)


class RefusesWithoutWords(ScaleAdapter):
    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        try:
            return super().adapter_load(model, name, folder, trainable, ctx)
        except ArtifactError as error:
            raise RuntimeError("size mismatch") from error


class MergesInHalf(ScaleAdapter):
    def adapter_merge_weight(self, model: Any, name: str, module: str, weight: Any, bias: Any) -> tuple[Any, Any]:
        return super().adapter_merge_weight(model, name, module, weight, bias)[0].half(), bias


class MergesInPlace(ScaleAdapter):
    def adapter_merge_weight(self, model: Any, name: str, module: str, weight: Any, bias: Any) -> tuple[Any, Any]:
        return weight.copy_(super().adapter_merge_weight(model, name, module, weight, bias)[0]), bias


class LeavesItsWrappers(ScaleAdapter):
    def adapter_unload(self, model: Any, name: str) -> Any:
        for _, module in scaled(model):
            del module.factors[name]
        return model


BROKEN = [
    (
        TrainsTheBase,
        "test_only_the_declared_parameters_train",
        "require a gradient and are not in",
    ),
    (ClaimsTheBase, "test_only_the_declared_parameters_train", "training changed parameters of the base"),
    (TrainsInTheBasesType, "test_what_trains_is_float32", "adapter_apply gives parameters to train that are not"),
    (LoadsInTheBasesType, "test_what_trains_is_float32", "adapter_load gives parameters to train that are not"),
    (SavesTooMuch, "test_the_file_holds_exactly_the_declared_tensors", "holds 1 tensors that"),
    (SavesTooLittle, "test_the_file_holds_exactly_the_declared_tensors", "but not in the file"),
    (SavesTooLittle, "test_saved_and_loaded_it_gives_the_same_logits", "it gives other logits"),
    (LeavesAChange, "test_unloaded_it_leaves_the_base_as_it_was", "left these tensors of the base changed"),
    (MergesTwice, "test_merged_equals_unmerged", "merged and unmerged logits differ"),
    (IgnoresTheSeed, "test_the_seed_decides_alone", "the same ctx.seed gives other weights at the start"),
    (DisturbsTheRandomState, "test_the_seed_decides_alone", "draws from the run's random numbers"),
    (StaysActive, "test_without_adapters_the_base_answers", "with no adapter active the logits are not the base's"),
    (ForgetsTheFirst, "test_a_second_adapter_leaves_the_first_untouched", "while the second adapter trains"),
    (UnderestimatesItself, "test_the_estimate_is_the_real_size", "adapter_estimate says .* and .* are attached"),
    (InventsModules, "test_targets_are_modules_of_the_base", "modules that the base does not have"),
    (NamesAModuleTwice, "test_targets_are_modules_of_the_base", "names a module twice"),
    (NamesNothing, "test_targets_are_modules_of_the_base", "gives no module at all"),
    (RefusesTheBase, "test_the_config_fits_the_base", "refuses these options on the base: target: not on this base"),
    (BlamesAnUnknownBase, "test_planning_an_unknown_base_is_possible", "blames the config for an unknown base"),
    (NeedsNonsense, "test_a_base_that_cannot_give_what_it_needs_is_refused", r"mean nothing: \['dequantise'\]"),
    (
        RecommendsWhatItDoesNotKnow,
        "test_what_it_recommends_can_be_planned",
        "adapter_recommend gives options that are refused",
    ),
    (RecommendsWhatItRefuses, "test_what_it_recommends_can_be_planned", "adapter_check refuses what adapter_recommend"),
    (DeclaresTwice, "test_only_the_declared_parameters_train", "gives a parameter more than once"),
    (DeclaresTheBase, "test_only_the_declared_parameters_train", "gives parameters that do not train: .*lm_head"),
    (DeclaresInAnyOrder, "test_only_the_declared_parameters_train", "has no stable order"),
    (LearnsBackwards, "test_only_the_declared_parameters_train", "5 steps do not lower the loss"),
    (ComesBackWeaker, "test_without_adapters_the_base_answers", "activated again gives other logits than before"),
    (AlwaysTrains, "test_saved_and_loaded_it_gives_the_same_logits", "loaded with trainable=False, these train"),
    (SavesUnannounced, "test_the_file_holds_exactly_the_declared_tensors", "adapter_save answers with .*, and wrote"),
    (SavesPickles, "test_the_file_holds_exactly_the_declared_tensors", r"saved as pickles.*\['adapter.bin'\]"),
    (ChangesWhatItRefuses, "test_a_base_that_it_does_not_fit_is_refused", "a base that was refused gives other logits"),
    (RefusesWithoutWords, "test_a_base_that_it_does_not_fit_is_refused", "ends in RuntimeError, not in ArtifactError"),
    (MergesInHalf, "test_merged_equals_unmerged", r"torch.float16 for .*, not fp32 \(out, in\)"),
    (MergesInPlace, "test_merged_equals_unmerged", "changes the weight that it is given"),
    (LeavesItsWrappers, "test_unloaded_it_leaves_the_base_as_it_was", "other tensors than before"),
    (LoadsAnything, "test_a_base_that_it_does_not_fit_is_refused", "loading onto a base of other sizes is not refused"),
]


@pytest.mark.parametrize("broken, test, message", BROKEN, ids=[f"{b.__name__}-{t}" for b, t, _ in BROKEN])
def test_a_broken_adapter_is_caught(broken: type[Adapter], test: str, message: str, tmp_path: Path) -> None:
    suite = TestAnHonestAdapter()
    hooks = RunHooks()
    hooks.add(broken(), suite.plugin)
    available = {
        "hooks": hooks.adapter(suite.plugin),
        "config": ScaleConfig(),
        "ctx": context(tmp_path),
        "tmp_path": tmp_path,
        "plugin_class": broken,
    }
    method = getattr(suite, test)
    wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        method(**{name: available[name] for name in wanted})


def test_a_need_that_no_quantizer_meets_is_a_problem_of_the_plan() -> None:
    from hyperion_core.compatibility import check_pair
    from hyperion_core.facts import Provides
    from hyperion_core.kinds import Quantizer

    class NeedsWeights(ScaleAdapter):
        capabilities = Capabilities(mergeable=True, needs=frozenset({"forward", "dequantize"}))

    class Opaque(Quantizer):
        provides = Provides(trainable=True)

    problem = check_pair(NeedsWeights, Opaque)
    assert problem is not None
    assert "dequantize" in problem.why and "Opaque" in problem.what and problem.fix
    assert check_pair(NeedsWeights, None) is None
    assert check_pair(ScaleAdapter, Opaque) is None
