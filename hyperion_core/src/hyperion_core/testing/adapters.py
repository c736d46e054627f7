"""The conformance suite of adapters: every promise of the contract, tried on a tiny model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest

from ..compatibility import check_pair
from ..config import AdapterConfig
from ..context import RunContext
from ..errors import ArtifactError, ConfigError
from ..facts import ModelFacts, ParamGroup, Provides, Recommendation, Workload
from ..hooks import RunHooks
from ..kinds import Adapter, Quantizer
from ..live_facts import live_model_facts
from ..plan import Plan
from ..specs import AdapterSpecs
from .bits import copies, digest, equal, saved_tensors
from .planning import planning
from .plugins import PluginConformance
from .refused import refused
from .tiny import tiny_llama

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

NAME = "default"
STEPS = 5
KNOWN_NEEDS = frozenset({"forward", "dequantize"})


class AdapterConformance(PluginConformance):
    """What an adapter must do. A test is two lines:

        class TestLora(AdapterConformance):
            plugin = "lora"

    options: options of the config beyond its defaults.
    random_start: False for an adapter whose first weights do not depend on the seed.
    learning_rate: with which five steps of Adam lower the loss.
    merge_tolerance: greatest difference of a logit between the merged and the unmerged model, relative to the
        largest logit.
    """

    kind = "adapter"
    random_start: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    merge_tolerance: ClassVar[float] = 1e-5

    # --- what an author may replace ---

    def base(self) -> Module:
        """A fresh base model, of the same weights every time."""
        return tiny_llama()

    def other_base(self) -> Module:
        """A base of other sizes, which an adapter of `base` does not fit."""
        return tiny_llama(hidden_size=48, intermediate_size=80)

    # --- fixtures ---

    @pytest.fixture
    def hooks(self, plugin_class: type[Adapter]) -> AdapterSpecs:
        """The adapter's hooks, called through pluggy as a run calls them."""
        pytest.importorskip("torch")
        hooks = RunHooks()
        hooks.add(plugin_class(), self.plugin)
        return hooks.adapter(self.plugin)

    @pytest.fixture
    def ctx(self, tmp_path: Path) -> RunContext:
        return context(tmp_path)

    # --- planning ---

    def test_the_config_fits_the_base(self, hooks: AdapterSpecs, config: AdapterConfig) -> None:
        """With the suite's options nothing may stand against an ordinary base."""
        problems = hooks.adapter_check(config=config, model=self.facts(), quantizer=None) or []
        assert not problems, f"adapter_check refuses these options on the base: {'; '.join(map(str, problems))}"

    def test_targets_are_modules_of_the_base(self, hooks: AdapterSpecs, config: AdapterConfig) -> None:
        """Every target is a module's full name, once."""
        targets = hooks.adapter_targets(config=config, model=self.facts())
        names = {name for name, _ in self.base().named_modules()}
        strange = [target for target in targets if target not in names]
        assert targets, "adapter_targets gives no module at all for a base that is known"
        assert not strange, f"adapter_targets names modules that the base does not have: {strange}"
        assert len(targets) == len(set(targets)), "adapter_targets names a module twice"

    def test_the_estimate_is_the_real_size(self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext) -> None:
        """The plan's number of trainable parameters is the number that trains."""
        cost = hooks.adapter_estimate(config=config, model=self.facts(), work=Workload(batch=1, length=8))
        model = hooks.adapter_apply(model=self.base(), name=NAME, config=config, ctx=ctx)
        held = sum(tensor.numel() * tensor.element_size() for tensor in self.declared(hooks, model, config).values())
        assert cost.memory.get("adapter") == held, (
            f'adapter_estimate says {cost.memory.get("adapter")} bytes ("adapter"), and {held} are attached'
        )

    def test_planning_an_unknown_base_is_possible(self, hooks: AdapterSpecs, config: AdapterConfig) -> None:
        """A base that is not local cannot be looked at: that is no fault of the config."""
        unknown = ModelFacts("somebody/some-model", why_unknown="the model is not local")
        problems = hooks.adapter_check(config=config, model=unknown, quantizer=None) or []
        assert not problems, f"adapter_check blames the config for an unknown base: {'; '.join(map(str, problems))}"

    def test_a_base_that_cannot_give_what_it_needs_is_refused(self, plugin_class: type[Adapter]) -> None:
        """`capabilities.needs` decides while planning which quantized bases are possible."""
        needs = plugin_class.capabilities.needs
        assert needs <= KNOWN_NEEDS, f"capabilities.needs holds words that mean nothing: {sorted(needs - KNOWN_NEEDS)}"
        problem = check_pair(plugin_class, _OpaqueQuantizer)
        assert (problem is not None) == ("dequantize" in needs), (
            "a base without full-precision weights is judged wrongly"
        )
        assert check_pair(plugin_class, _OpenQuantizer) is None, "a base that offers everything is refused"

    def test_what_it_recommends_can_be_planned(self, hooks: AdapterSpecs, config: AdapterConfig) -> None:
        """What `adapter_recommend` gives, where a plugin has it, fits the config and the base."""
        facts = self.facts()
        with planning("adapter_recommend"):
            found = hooks.adapter_recommend(config=config, model=facts, quantizer=None) or Recommendation()
        try:
            filled = type(config).parse({**found.options, **config.given()})
        except ConfigError as error:
            pytest.fail(f"adapter_recommend gives options that are refused: {error}")
        problems = hooks.adapter_check(config=filled, model=facts, quantizer=None) or []
        assert not problems, f"adapter_check refuses what adapter_recommend gives: {'; '.join(map(str, problems))}"

    # --- training ---

    def test_only_the_declared_parameters_train(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext
    ) -> None:
        """What requires a gradient is what `adapter_param_groups` gives, once, and five steps on it lower the loss."""
        base = self.base()
        before = {name: (parameter, parameter.detach().clone()) for name, parameter in base.named_parameters()}
        model = hooks.adapter_apply(model=base, name=NAME, config=config, ctx=ctx)
        groups = hooks.adapter_param_groups(model=model, name=NAME, config=config)
        counts = Counter(id(parameter) for group in groups for _, parameter in group.parameters)
        twice = [name for group in groups for name, parameter in group.parameters if counts[id(parameter)] > 1]
        assert not twice, f"adapter_param_groups gives a parameter more than once: {sorted(set(twice))}"
        trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        stray = sorted(name for key, name in trainable.items() if key not in counts)
        assert not stray, f"these require a gradient and are not in adapter_param_groups: {stray}"
        frozen = [name for group in groups for name, p in group.parameters if id(p) not in trainable]
        assert not frozen, f"adapter_param_groups gives parameters that do not train: {frozen}"
        again = hooks.adapter_param_groups(model=model, name=NAME, config=config)
        assert _order(groups) == _order(again), "adapter_param_groups has no stable order: resuming would mix up states"

        first = self.loss(model)
        self.train(hooks, model, config)
        last = self.loss(model)
        assert last < first, f"{STEPS} steps do not lower the loss: {first:.6f} before, {last:.6f} after"
        changed = [name for name, (parameter, value) in before.items() if not equal(parameter, value)]
        assert not changed, f"training changed parameters of the base: {changed}"

    def test_what_trains_is_float32(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext, tmp_path: Path
    ) -> None:
        """Over a bfloat16 base too, attached or loaded: small steps would be lost in the rounding of half the bits."""
        import torch

        folder = tmp_path / "saved"
        folder.mkdir()
        model = hooks.adapter_apply(model=self.base().to(torch.bfloat16), name=NAME, config=config, ctx=ctx)
        attached = self.declared(hooks, model, config)
        hooks.adapter_save(model=model, name=NAME, config=config, folder=folder, for_resume=True)
        again = self.base().to(torch.bfloat16)
        again = hooks.adapter_load(model=again, name=NAME, folder=folder, trainable=True, ctx=ctx)
        loaded = self.declared(hooks, again, config)
        for hook, found in (("adapter_apply", attached), ("adapter_load", loaded)):
            other = {name: str(tensor.dtype) for name, tensor in found.items() if tensor.dtype != torch.float32}
            assert not other, f"over a bfloat16 base {hook} gives parameters to train that are not float32: {other}"

    def test_the_seed_decides_alone(self, hooks: AdapterSpecs, config: AdapterConfig, tmp_path: Path) -> None:
        """Same seed, same bits, whatever the state of the global generator, which is left alone; other seed, others."""
        import torch

        runs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        for seed, surroundings in ((7, 1), (7, 2), (8, 1)):
            torch.manual_seed(surroundings)
            before = torch.get_rng_state()
            model = hooks.adapter_apply(model=self.base(), name=NAME, config=config, ctx=context(tmp_path, seed))
            assert torch.equal(torch.get_rng_state(), before), (
                "adapter_apply draws from the run's random numbers: seed a generator of its own, or use fork_rng"
            )
            start = copies(self.declared(hooks, model, config))
            torch.manual_seed(0)
            self.train(hooks, model, config)
            runs.append((start, copies(self.declared(hooks, model, config))))
        for moment, one, two in (("at the start", runs[0][0], runs[1][0]), ("after training", runs[0][1], runs[1][1])):
            differing = [name for name in one if not equal(one[name], two[name])]
            assert not differing, f"the same ctx.seed gives other weights {moment}: {differing[:5]}"
        same = all(equal(runs[0][0][name], runs[2][0][name]) for name in runs[0][0])
        if self.random_start:
            assert not same, "another ctx.seed gives the same start: use it, or set random_start = False on this test"
        else:
            assert same, "random_start is False, and the start depends on the seed"

    # --- one among others ---

    def test_without_adapters_the_base_answers(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext
    ) -> None:
        """`adapter_activate(model, {})` gives the base's logits to the bit, and the adapter comes back afterwards."""
        expected = self.logits(self.base())
        model = self.trained(hooks, config, ctx)
        tuned = self.logits(model)
        hooks.adapter_activate(model=model, weights={})
        assert equal(self.logits(model), expected), "with no adapter active the logits are not the base's, bit for bit"
        hooks.adapter_activate(model=model, weights={NAME: 1.0})
        assert equal(self.logits(model), tuned), "an adapter that is activated again gives other logits than before"

    def test_a_second_adapter_leaves_the_first_untouched(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext, tmp_path: Path
    ) -> None:
        """A second one under another name trains alone, and goes without a trace."""
        model = self.trained(hooks, config, ctx)
        tuned = self.logits(model)
        first = self.declared(hooks, model, config)
        values = copies(first)
        model = hooks.adapter_apply(model=model, name="second", config=config, ctx=context(tmp_path, 99))
        own = {id(p) for group in hooks.adapter_param_groups(model=model, name="second", config=config)
               for _, p in group.parameters}  # fmt: skip
        others = sorted(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own)
        assert own, "adapter_param_groups gives nothing for a second adapter"
        assert not others, f"while the second adapter trains, these train too: {others}"
        hooks.adapter_activate(model=model, weights={"second": 1.0})
        self.train(hooks, model, config, "second")
        changed = [name for name, parameter in first.items() if not equal(parameter, values[name])]
        assert not changed, f"training the second adapter changed the first: {changed}"
        hooks.adapter_activate(model=model, weights={NAME: 1.0})
        assert equal(self.logits(model), tuned), "beside a second adapter the first gives other logits"
        model = hooks.adapter_unload(model=model, name="second")
        hooks.adapter_activate(model=model, weights={NAME: 1.0})
        assert equal(self.logits(model), tuned), "after the second adapter is gone the first gives other logits"

    # --- files ---

    def test_saved_and_loaded_it_gives_the_same_logits(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext, tmp_path: Path
    ) -> None:
        """Save, fresh base, load under any name: equal logits; `trainable` decides what trains."""
        model = self.trained(hooks, config, ctx)
        tuned = self.logits(model)
        folder = tmp_path / "saved"
        folder.mkdir()
        hooks.adapter_save(model=model, name=NAME, config=config, folder=folder, for_resume=False)
        for name, trainable in ((NAME, True), ("another", False)):
            loaded = hooks.adapter_load(model=self.base(), name=name, folder=folder, trainable=trainable, ctx=ctx)
            assert equal(self.logits(loaded), tuned), f'loaded under the name "{name}" it gives other logits'
            training = [n for n, p in loaded.named_parameters() if p.requires_grad]
            assert bool(training) == trainable, f"loaded with trainable={trainable}, these train: {training[:5]}"

    def test_the_file_holds_exactly_the_declared_tensors(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext, tmp_path: Path
    ) -> None:
        """Every declared tensor is in the safetensors files, bit for bit, and nothing else is in the folder."""
        model = self.trained(hooks, config, ctx)
        folder = tmp_path / "saved"
        folder.mkdir()
        paths = hooks.adapter_save(model=model, name=NAME, config=config, folder=folder, for_resume=False)
        written = {path for path in folder.rglob("*") if path.is_file()}
        assert written == {Path(path) for path in paths}, (
            f"adapter_save answers with {sorted(map(str, paths))}, and wrote {sorted(map(str, written))}"
        )
        pickled = [path.name for path in written if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
        assert not pickled, f"weights are saved as pickles, which can run code: {pickled}; use safetensors"
        saved = Counter(digest(value) for path in written for value in saved_tensors(path))
        declared = {name: digest(value) for name, value in self.declared(hooks, model, config).items()}
        missing = [name for name, digest in declared.items() if digest not in saved]
        assert not missing, f"declared and trained, but not in the file: {missing}"
        extra = sum((saved - Counter(declared.values())).values())
        assert not extra, f"the file holds {extra} tensors that adapter_param_groups does not declare"

    def test_a_base_that_it_does_not_fit_is_refused(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext, tmp_path: Path
    ) -> None:
        """Loading onto a base of other sizes is an ArtifactError, and that base stays as it was."""
        folder = tmp_path / "saved"
        folder.mkdir()
        hooks.adapter_save(
            model=self.trained(hooks, config, ctx), name=NAME, config=config, folder=folder, for_resume=False
        )
        other = self.other_base()
        expected = self.logits(other)
        with refused("loading onto a base of other sizes", ArtifactError):
            hooks.adapter_load(model=other, name=NAME, folder=folder, trainable=True, ctx=ctx)
        assert equal(self.logits(other), expected), "a base that was refused gives other logits than before"

    # --- leaving ---

    def test_merged_equals_unmerged(
        self, hooks: AdapterSpecs, plugin_class: type[Adapter], config: AdapterConfig, ctx: RunContext
    ) -> None:
        """The base with merged weights gives the adapted model's logits; the model itself stays as it is."""
        if not plugin_class.capabilities.mergeable:
            pytest.skip("capabilities.mergeable is False")
        import torch

        model = self.trained(hooks, config, ctx)
        tuned = self.logits(model)
        merged = self.base()
        for target in hooks.adapter_targets(config=config, model=self.facts()):
            module = cast(Any, merged.get_submodule(target))
            bias = getattr(module, "bias", None)
            given = module.weight.detach().clone(), None if bias is None else bias.detach().clone()
            weight, new_bias = hooks.adapter_merge_weight(
                model=model, name=NAME, module=target, weight=given[0], bias=given[1]
            )
            assert weight.shape == module.weight.shape and weight.dtype == torch.float32, (
                f"adapter_merge_weight gives {tuple(weight.shape)} {weight.dtype} for {target}, not fp32 (out, in)"
            )
            assert equal(given[0], module.weight.detach()), "adapter_merge_weight changes the weight that it is given"
            module.weight.data = weight
            if new_bias is not None:
                module.bias = torch.nn.Parameter(new_bias)
        assert equal(self.logits(model), tuned), "adapter_merge_weight changes the model"
        distance = (self.logits(merged) - tuned).abs().max().item() / tuned.abs().max().item()
        assert distance <= self.merge_tolerance, f"merged and unmerged logits differ by {distance:.1e} of the largest"

    def test_unloaded_it_leaves_the_base_as_it_was(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext
    ) -> None:
        """The base is bit-equal after `adapter_unload`: its class, its tensors' names and values, its logits."""
        fresh = self.base()
        model = hooks.adapter_unload(model=self.trained(hooks, config, ctx), name=NAME)
        assert type(model) is type(fresh), f"the model is a {type(model).__name__}, and was a {type(fresh).__name__}"
        left, right = model.state_dict(), fresh.state_dict()
        assert list(left) == list(right), f"other tensors than before: {sorted(set(left) ^ set(right))[:5]}"
        changed = [name for name in right if not equal(left[name], right[name])]
        assert not changed, f"unloading left these tensors of the base changed: {changed}"
        assert equal(self.logits(model), self.logits(fresh)), "the base gives other logits: something is left in it"

    # --- what the tests above are made of ---

    def facts(self) -> ModelFacts:
        return live_model_facts(self.base())

    def batch(self) -> Tensor:
        """Token ids (4, 12), the same every time."""
        import torch

        return torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(0))

    def logits(self, model: Module) -> Tensor:
        import torch

        with torch.no_grad():
            return cast("Tensor", model.eval()(input_ids=self.batch()).logits)

    def loss(self, model: Module) -> float:
        import torch

        with torch.no_grad():
            return float(model.eval()(input_ids=self.batch(), labels=self.batch()).loss)

    def declared(
        self, hooks: AdapterSpecs, model: Module, config: AdapterConfig, name: str = NAME
    ) -> dict[str, Tensor]:
        groups = hooks.adapter_param_groups(model=model, name=name, config=config)
        return {parameter_name: parameter for group in groups for parameter_name, parameter in group.parameters}

    def train(self, hooks: AdapterSpecs, model: Module, config: AdapterConfig, name: str = NAME) -> None:
        """Five steps of Adam on one batch, with the adapter's own loss and step hooks."""
        import torch

        groups = hooks.adapter_param_groups(model=model, name=name, config=config)
        optimizer = torch.optim.Adam(
            [{"params": [p for _, p in g.parameters], "lr": self.learning_rate * g.lr_ratio} for g in groups]
        )
        model.train()
        for step in range(1, STEPS + 1):
            loss = model(input_ids=self.batch(), labels=self.batch()).loss
            further = hooks.adapter_loss(model=model, name=name)
            (loss if further is None else loss + further).backward()
            optimizer.step()
            hooks.adapter_after_step(model=model, name=name, step=step, total=STEPS)
            optimizer.zero_grad()
        model.eval()

    def trained(self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext) -> Module:
        model = hooks.adapter_apply(model=self.base(), name=NAME, config=config, ctx=ctx)
        self.train(hooks, model, config)
        return model


def context(folder: Path, seed: int = 7) -> RunContext:
    """A run for tests: on the CPU, in `folder`."""
    plan = Plan(config={"base_model": "tiny-llama"}, choices=(), device="cpu", dtype="float32")
    return RunContext(plan=plan, seed=seed, device="cpu", output=folder / "run", cache=folder / "cache")


class _OpaqueQuantizer(Quantizer):
    """Hands out no full-precision weights."""

    provides = Provides(bits=frozenset({4}), trainable=True, dequantize=False)


class _OpenQuantizer(Quantizer):
    """Hands out everything."""

    provides = Provides(bits=frozenset({4}), trainable=True, dequantize=True)


def _order(groups: list[ParamGroup]) -> list[tuple[str, list[str]]]:
    return [(group.name, [name for name, _ in group.parameters]) for group in groups]
