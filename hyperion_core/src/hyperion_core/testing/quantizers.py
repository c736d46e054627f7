"""The conformance suite of quantizers: a tiny model is quantized, judged by its own tensors, trained on, reloaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ..context import RunContext
from ..errors import HyperionError
from ..facts import BitPlan, ModelFacts
from ..hooks import RunHooks
from ..kinds import Quantizer
from ..plan import Plan
from .bits import digest, equal, saved_tensors
from .planning import planning
from .plugins import PluginConformance
from .quantizer_trial import NEAR, UNQUANTIZED, Calibration, Trial, logits, skip_unless
from .quantizer_weights import (
    BIAS_NEAR,
    COARSE,
    assert_fake_is_real,
    assert_requantized,
    assert_trains,
    assert_true_gradients,
    assert_used,
    offset,
)
from .refused import refused
from .resident import resident_bytes, resident_tensors
from .tiny import save_biased_base

DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")
MISFIT = 48  # a group size that does not divide the widths of the base


class QuantizerConformance(PluginConformance):
    """What a quantizer must do. A test is two lines:

        class TestMine(QuantizerConformance):
            plugin = "mine"

    options: options of the config beyond its defaults; each declared width replaces `bits`.
    device: where the base is quantized, "cpu" or "cuda".
    learning_rate: with which five steps of Adam on a low-rank delta lower the loss.
    tolerance: greatest difference between what forward uses and `quantizer_dequantize`, relative to the largest value.
    """

    kind = "quantizer"
    device: ClassVar[str] = "cpu"
    learning_rate: ClassVar[float] = 1e-2
    tolerance: ClassVar[float] = 1e-5
    _kept: ClassVar[Path]

    # --- what an author may replace ---

    def save_base(self, folder: Path) -> Path:
        """Write the base that is quantized, in transformers' format: the same weights every time, with biases."""
        return save_biased_base(folder, hidden_size=128, intermediate_size=256)

    def calibration(self) -> Calibration:
        """Rows for a quantizer that declares `calibration`: 16 of 32 tokens."""
        import torch

        ids = torch.randint(0, 250, (16, 1, 32), generator=torch.Generator().manual_seed(1))
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    # --- fixtures ---

    @pytest.fixture
    def trial(self, plugin_class: type[Quantizer], tmp_path: Path, kept: Path) -> Trial:
        return replace(self.on_trial(plugin_class, tmp_path), kept=kept)

    @pytest.fixture
    def kept(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """For what is quantized offline: that takes long, and many tests of a class ask for the same."""
        own = type(self)
        if "_kept" not in vars(own):
            own._kept = tmp_path_factory.mktemp("quantized")
        return own._kept

    def on_trial(self, plugin_class: type[Quantizer], folder: Path) -> Trial:
        """The quantizer, its hooks called through pluggy as a run calls them, and its base in `folder`."""
        torch = pytest.importorskip("torch")
        pytest.importorskip("transformers")
        skip_unless(self.device != "cuda" or torch.cuda.is_available(), "needs a CUDA device")
        hooks = RunHooks()
        hooks.add(plugin_class(), self.plugin)
        plan = Plan(config={"base_model": "tiny-llama"}, choices=(), device=self.device, dtype="float32")
        ctx = RunContext(plan=plan, seed=7, device=self.device, output=folder / "run", cache=folder / "cache")
        source = self.save_base(folder / "base")
        return Trial(plugin_class, hooks.quantizer(self.plugin), source, ctx, self.options, self.calibration)

    # --- planning: torch-free ---

    def test_it_declares_what_it_can_do(self, plugin_class: type[Quantizer]) -> None:
        """`provides` names bits and devices: plans are made from them."""
        provides = plugin_class.provides
        assert provides.bits - {UNQUANTIZED}, "provides.bits names no width below 16 bits"
        strange = sorted(bits for bits in provides.bits if not 1 <= bits <= UNQUANTIZED)
        assert not strange, f"provides.bits holds {strange}: a weight has 1 to 16 bits"
        assert self.device in provides.devices, (
            f'provides.devices, {sorted(provides.devices)}, lacks "{self.device}", on which this suite runs'
        )

    def test_the_check_lets_every_declared_width_pass(self, trial: Trial) -> None:
        """Nothing stands against what `provides` declares, on a base that is known and on one that is not local."""
        unknown = ModelFacts("somebody/some-model", why_unknown="the model is not local")
        for bits in trial.widths:
            for what, facts in (("an ordinary base", trial.facts), ("a base that is not local", unknown)):
                problems = trial.problems(BitPlan(bits, 0), facts=facts)
                assert not problems, f"{bits} bits, which provides.bits declares, are refused on {what}: {problems}"

    def test_bits_that_it_cannot_do_are_refused(self, trial: Trial) -> None:
        """While planning, wherever they stand in a plan; what it can do is named."""
        for bits in sorted(set(range(1, UNQUANTIZED)) - trial.plugin.provides.bits):
            plans = {f"{bits} bits": BitPlan(bits, 0)}
            if trial.plugin.provides.per_module:
                plans[f"{bits} bits in some modules"] = BitPlan(trial.widths[0], 0, {"*.down_proj": (bits, 0)})
            for what, plan in plans.items():
                problems = trial.problems(plan)
                assert problems, f"quantizer_check lets {what} pass, and provides.bits lacks that"
                unnamed = [width for width in trial.widths if str(width) not in problems]
                assert not unnamed, f"the refusal of {what} does not say that it can do {unnamed}: {problems}"

    def test_a_device_that_it_cannot_use_is_refused(self, trial: Trial) -> None:
        """While planning; those that it can use are named."""
        usable = trial.plugin.provides.devices
        for device in (device for device in DEVICES if device not in usable):
            problems = trial.problems(trial.narrow, device=device)
            assert problems, f'quantizer_check lets the device "{device}" pass, and provides.devices lacks it'
            unnamed = [each for each in sorted(usable) if each not in problems]
            assert not unnamed, f'the refusal of "{device}" does not say that it can use {unnamed}: {problems}'

    def test_it_says_which_type_it_answers_fast_in(self, trial: Trial) -> None:
        """One that there is, or none; without torch."""
        for device in DEVICES:
            with planning("quantizer_inference_dtype"):
                said = trial.hooks.quantizer_inference_dtype(
                    config=trial.config(trial.narrow), bits=trial.narrow, device=device
                )
            assert said in (None, *DTYPES), f'quantizer_inference_dtype gives {said!r} for "{device}"'

    def test_a_group_size_that_does_not_fit_is_refused_or_works(self, trial: Trial) -> None:
        """One that does not divide the width of a layer: refused with a layer's name, or the model works."""
        skip_unless(self.has_groups(trial), "this method has no group_size")
        plan = BitPlan(trial.widths[0], MISFIT)
        if problems := trial.problems(plan):
            named = any(module.name in problems for module in trial.facts.linear()) or str(MISFIT) in problems
            assert named, f"a group size of {MISFIT} is refused, and neither it nor a layer is named: {problems}"
            return
        try:
            found = logits(trial.load(plan))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            pytest.fail(f"quantizer_check lets a group size of {MISFIT} pass, and loading ends in {what}")
        assert found.isfinite().all(), f"quantizer_check lets a group size of {MISFIT} pass, and logits are not finite"

    # --- what is in memory ---

    def test_every_declared_width_works(self, trial: Trial) -> None:
        """Each loads and answers with finite numbers, in bfloat16 too; more bits are nearer to the base."""
        errors = {}
        for bits in trial.widths:
            for dtype in ("bfloat16", "float32"):
                model = trial.load(BitPlan(bits, 0), dtype=dtype)
                assert logits(model).isfinite().all(), f"with {bits} bits in {dtype} the logits are not finite"
            errors[bits] = trial.distance_from_base(model)
        falls = all(errors[one] > errors[two] for one, two in zip(trial.widths, trial.widths[1:], strict=False))
        assert falls, f"more bits do not bring the model nearer to its base; its distance by bits: {errors}"

    def test_the_estimate_is_the_real_size(self, trial: Trial, tmp_path: Path) -> None:
        """Within 5% of the quantized modules, in memory and on disk, whatever the groups and the rest's type."""
        widest = BitPlan(trial.widths[-1], 0)
        for number, (plan, dtype) in enumerate([*((plan, "float32") for plan in trial.plans), (widest, "bfloat16")]):
            self.assert_estimated(trial, plan, dtype, tmp_path / str(number))

    def test_the_modules_report_the_truth(self, trial: Trial) -> None:
        """`quantizer_modules` lists what the plan quantizes, and the tensors bear it out."""
        for plan in trial.plans:
            trial.assert_as_planned(trial.load(plan), plan)

    def test_overrides_are_honoured(self, trial: Trial, tmp_path: Path) -> None:
        """With `provides.per_module` a module has its own bits, and 16 leave it as it is; without, they are refused."""
        problems = trial.problems(trial.mixed)
        if not trial.plugin.provides.per_module:
            assert problems, "provides.per_module is False, and quantizer_check lets bits of single modules pass"
            return
        assert not problems, f"provides.per_module is True, and bits of single modules are refused: {problems}"
        trial.assert_as_planned(trial.load(trial.mixed), trial.mixed)
        self.assert_estimated(trial, trial.mixed, "float32", tmp_path / "mixed")

    def test_what_is_not_quantized_stays_as_it_is(self, trial: Trial) -> None:
        """Embeddings, norms and the head are the base's, to the bit; a quantized module keeps its bias."""
        model = trial.load()
        quantized = tuple(f"{name}." for name in trial.infos(model))
        found = dict(model.named_parameters())
        for name, expected in trial.base.named_parameters():
            if not name.startswith(quantized):
                assert name in found, f"{name}, which is not quantized, is gone from the model"
                assert equal(found[name].detach(), expected.detach()), f"{name}, which is not quantized, is changed"
        for name in quantized:
            far = (offset(model.get_submodule(name[:-1])) - offset(trial.base.get_submodule(name[:-1]))).abs().max()
            assert far <= BIAS_NEAR, f"the bias of {name[:-1]} is lost or changed: its output is {far:.1e} apart"

    def test_dequantize_gives_what_forward_uses(self, trial: Trial) -> None:
        """For each quantized module: fp32, (out, in), and the very numbers that its inputs are multiplied with."""
        self.needs_dequantize(trial)
        for plan in trial.plans:
            assert_used(trial, trial.load(plan), f"{plan.bits} bits", self.tolerance)
        narrow = trial.load(dtype="bfloat16")
        assert_used(trial, narrow, f"{trial.narrow.bits} bits in bfloat16", max(self.tolerance, COARSE))

    def test_the_same_seed_gives_the_same_bits(self, trial: Trial, tmp_path: Path) -> None:
        """Whatever the state of the global generator, which is left alone."""
        import torch

        plan, runs = trial.narrow, []
        for surroundings in (1, 2):
            torch.manual_seed(surroundings)
            before = torch.get_rng_state()
            rows = trial.rows() if trial.plugin.provides.calibration else None
            prepared = trial.prepare(plan, tmp_path / f"run-{surroundings}", rows)
            drawn = not torch.equal(torch.get_rng_state(), before)
            loaded = trial.from_pretrained(prepared, plan)
            torch.set_rng_state(before)  # transformers may draw, and that is no fault of the quantizer
            model = trial.after_load(loaded, plan)
            assert not drawn and torch.equal(torch.get_rng_state(), before), (
                "quantizing draws from the run's random numbers: use a generator of its own, seeded with ctx.seed"
            )
            runs.append({name: digest(tensor) for name, tensor in resident_tensors(model).items()})
        differing = [name for name in runs[0] if runs[0][name] != runs[1].get(name)]
        assert not differing, f"the same seed gives other bits the second time: {differing[:5]}"

    def test_without_calibration_data_it_refuses(self, trial: Trial, tmp_path: Path) -> None:
        """A quantizer that declares `calibration` says so where there is none, and where it is empty."""
        skip_unless(trial.plugin.provides.calibration, "provides.calibration is False")
        for what, rows in (("calibration=None", None), ("an empty calibration", [])):
            with refused(f"quantizing with {what}"):
                trial.prepare(trial.narrow, tmp_path / what, rows)

    # --- files ---

    def test_saved_and_reloaded_it_gives_the_same_logits(self, trial: Trial, tmp_path: Path) -> None:
        """From the saved files alone: the base that was quantized is gone, and so is what the run cached."""
        trial = replace(trial, kept=None)
        plans = [trial.narrow, *([trial.mixed] if trial.plugin.provides.per_module else [])]
        loaded = [trial.load(plan) for plan in plans]
        before = [(logits(model), trial.infos(model), resident_bytes(model)) for model in loaded]
        for number, (model, plan) in enumerate(zip(loaded, plans, strict=True)):
            trial.save(model, plan, tmp_path / f"saved-{number}")
        trial.source.rename(tmp_path / "no-longer-there")
        shutil.rmtree(trial.ctx.cache, ignore_errors=True)
        for number, (plan, (expected, modules, size)) in enumerate(zip(plans, before, strict=True)):
            bits = "bits by module, " if plan.overrides else ""
            again = trial.load(plan, source=tmp_path / f"saved-{number}")
            assert equal(logits(again), expected), f"{bits}saved and loaded again, it gives other logits"
            assert trial.infos(again) == modules, (
                f"{bits}saved and loaded again, quantizer_modules reports something else"
            )
            grown = resident_bytes(again)
            assert grown <= size * (1 + NEAR), (
                f"{bits}loaded again it takes {grown:,} bytes, and {size:,} before it was saved"
            )
            try:
                trial.save(again, plan, tmp_path / f"again-{number}")
            except Exception as error:
                pytest.fail(f"{bits}saved and loaded again, it cannot be saved: {type(error).__name__}: {error}")
            twice = trial.load(plan, source=tmp_path / f"again-{number}")
            assert equal(logits(twice), expected), f"{bits}saved and loaded a second time, it gives other logits"

    def test_what_it_saved_it_recognizes(self, trial: Trial, tmp_path: Path) -> None:
        """From config.json alone, and without torch: the bits of every module, and options that its config takes."""
        reads = trial.plugin.provides.reads
        skip_unless(bool(reads), "provides.reads is empty")
        plans = [*trial.plans, *([trial.mixed] if trial.plugin.provides.per_module else [])]
        for index, plan in enumerate(plans):
            folder = tmp_path / str(index)
            trial.save(trial.load(plan), plan, folder)
            saved = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
            name = saved.get("quant_method")
            assert name in reads, f'config.json says quant_method "{name}", and provides.reads has {sorted(reads)}'
            with planning("quantizer_recognize"):
                options, found = trial.hooks.quantizer_recognize(saved=saved, model=trial.facts)
            trial.plugin.config_class.parse({**trial.options, **options})
            for module in trial.facts.linear():
                bits, group = plan.of(module.name)
                read = found.of(module.name)
                assert read[0] == bits and (not group or bits == UNQUANTIZED or read[1] == group), (
                    f"{module.name} was saved with (bits, group size) {(bits, group)}, "
                    f"and quantizer_recognize reads {read}"
                )

    def test_a_base_of_other_bits_is_refused(self, trial: Trial, tmp_path: Path) -> None:
        """One that is quantized already, otherwise than planned: else it would be trained on unnoticed."""
        skip_unless(len(trial.widths) > 1, "one width alone is declared")
        trial.save(trial.load(), trial.narrow, tmp_path / "saved")
        plan = BitPlan(trial.widths[-1], 0)
        with refused(f"a base saved with {trial.widths[0]} bits, under a plan of {plan.bits}"):
            trial.load(plan, source=tmp_path / "saved")

    # --- training on top ---

    def test_training_on_top_leaves_the_base_alone(self, trial: Trial) -> None:
        """Five steps of a low-rank delta lower the loss; no tensor of the base trains or changes."""
        self.needs_trainable(trial)
        for bits in trial.widths:
            assert_trains(trial.load(BitPlan(bits, 0)), trial, f"{bits} bits", self.learning_rate)

    def test_gradients_are_those_of_the_dequantized_weight(self, trial: Trial) -> None:
        """What trains below a quantized module learns from a true gradient."""
        self.needs_trainable(trial)
        self.needs_dequantize(trial)
        assert_true_gradients(trial.load(), trial, 10 * self.tolerance)

    # --- the weights themselves ---

    def test_what_is_written_into_a_weight_is_not_lost(self, trial: Trial) -> None:
        """PEFT's own merge assigns to `weight.data`: what is put there is held, or it is refused."""
        self.needs_dequantize(trial)
        import torch

        model = trial.load()
        name = next(iter(trial.infos(model)))
        module: Any = model.get_submodule(name)
        seen, before = getattr(module, "weight", None), trial.weight(module, name)
        ordinary = isinstance(seen, torch.Tensor) and seen.is_floating_point() and seen.shape == before.shape
        skip_unless(ordinary, "its modules have no weight that PEFT would take for an ordinary one")
        try:
            module.weight.data = before.flip(0).to(module.weight.dtype)
        except HyperionError:
            return
        assert equal(trial.weight(module, name), before.flip(0)), (
            f"what is assigned to {name}.weight.data is lost without a word, as an adapter that PEFT merges would be: "
            "hyperion_core.unpacked_weight refuses it"
        )

    def test_fake_quantize_agrees_with_the_real_one(self, trial: Trial) -> None:
        """Same shape and type; and, where no calibration enters, the numbers that the quantized module holds."""
        skip_unless(hasattr(trial.plugin, "quantizer_fake_quantize"), "quantizer_fake_quantize is not implemented")
        for plan in trial.plans:
            assert_fake_is_real(trial.load(plan), trial, plan, self.tolerance)

    def test_requantize_holds_the_weight_that_it_is_given(self, trial: Trial) -> None:
        """As nearly as the bits allow, with groups and bias of the module before, which stays as it was."""
        skip_unless(hasattr(trial.plugin, "quantizer_requantize"), "quantizer_requantize is not implemented")
        self.needs_dequantize(trial)
        for plan in trial.plans:
            assert_requantized(trial.load(plan), trial, plan, self.tolerance)

    # --- what several checks need ---

    def assert_estimated(self, trial: Trial, plan: BitPlan, dtype: str, folder: Path) -> None:
        model = trial.load(plan, dtype=dtype)
        written = trial.save(model, plan, folder)
        real = resident_bytes(model), sum(tensor.nbytes for path in written for tensor in saved_tensors(path))
        groups = f" in groups of {plan.group_size}" if plan.group_size else ""
        bits = f"{plan.bits} bits{groups}" if not plan.overrides else f"{plan.bits} bits and others in some modules"
        allowed = NEAR * sum(info.nbytes for info in trial.infos(model).values())
        for what, said, size in zip(("in memory", "on disk"), trial.estimate(plan, dtype), real, strict=True):
            assert abs(said - size) <= allowed, (
                f"with {bits} over {dtype} quantizer_estimate says {said:,} bytes {what}, and it is {size:,}"
            )

    def has_groups(self, trial: Trial) -> bool:
        return "group_size" in getattr(trial.plugin.config_class, "understood", ())

    def needs_dequantize(self, trial: Trial) -> None:
        skip_unless(trial.plugin.provides.dequantize, "provides.dequantize is False")

    def needs_trainable(self, trial: Trial) -> None:
        skip_unless(trial.plugin.provides.trainable, "provides.trainable is False")
