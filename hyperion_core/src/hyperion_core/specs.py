"""The contract: every hook that a plugin may implement, on one page.

A plugin is a class that inherits one of the bases in `hyperion_core.kinds`, and its hooks are methods with the
names below (no decorator needed). It may take fewer arguments than the specification gives, never others, and
none with a default, so an argument added here breaks nobody. ★ marks the hooks that a plugin of the kind must
have; the others are called only where a plugin has them.

Driver hooks answer with one value (`firstresult`): exactly one plugin drives. A hook marked [all] is called on
every chosen plugin, and answers with a list. Trackers, safeguards and observers find their own options in
`self.config`, set before their first hook. An observer may wrap any hook with `@hookimpl(wrapper=True)`.

Shapes: B rows, T tokens a row, N supervised tokens, K adapters a token, P parameters. Sizes are bytes unless
a name says otherwise. `ctx` is a `hyperion_core.context.RunContext`; other types stand in `hyperion_core.facts`.
"torch-free" hooks run while planning, and must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from .artifact import Artifact
    from .config import AdapterConfig, PluginConfig, QuantizationConfig
    from .context import RunContext
    from .errors import Problem
    from .facts import (
        BitPlan,
        Cost,
        Deployment,
        FileRef,
        Horizon,
        InForce,
        LaunchSpec,
        ModelFacts,
        PackageFacts,
        ParamGroup,
        Provides,
        QuantInfo,
        Recommendation,
        RowFacts,
        Score,
        Segments,
        Sequence,
        TokenScores,
        Verdict,
        Workload,
        World,
    )
    from .language_model import LanguageModel
    from .plan import Plan

PROJECT = "hyperion"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
driver = hookspec(firstresult=True)


class AdapterSpecs:
    """Adapters: trainable parameters on a frozen base. Several may live in one model, told apart by `name`."""

    @driver
    def adapter_check(self, config: AdapterConfig, model: ModelFacts, quantizer: Provides | None) -> list[Problem]:
        """Torch-free. What stands against this config on this base. `model.known` may be False."""

    @driver
    def adapter_targets(self, config: AdapterConfig, model: ModelFacts) -> list[str]:
        """★ Torch-free. Full names of the modules that it will touch; raises CompatibilityError for none.

        Example: `["model.layers.0.self_attn.q_proj", …]`."""

    @driver
    def adapter_estimate(self, config: AdapterConfig, model: ModelFacts, work: Workload) -> Cost:
        """★ Torch-free. What it adds to one step, in bytes: "adapter" (what of it trains), "weights" (what it holds
        besides) and "activations": what autograd keeps for it, beside the inputs of its targets, which are counted
        without it; with `work.checkpointing` as if all layers computed theirs again, one at a time."""

    @driver
    def adapter_recommend(
        self, config: AdapterConfig, model: ModelFacts, quantizer: Provides | None
    ) -> Recommendation | None:
        """Torch-free. What `quality: auto` fills in: settings that were measured to be good, for what `config` leaves
        out. They are valid together with what it says (`config.given()`), which they never replace. None: nothing is
        recommended for this config on this base."""

    @driver
    def adapter_prepare(
        self, config: AdapterConfig, model: Module, batches: Iterable[Mapping[str, Tensor]], ctx: RunContext
    ) -> AdapterConfig:
        """Initialise from data: gives the config to attach. Called once, before `adapter_apply`, and not when a run
        resumes, which uses the config that was saved. The model stays as it was.

        batches: tokenized training batches on the model's device, a fresh iterator: `input_ids`, `attention_mask` and
        `labels`, each int64 (B, T)."""

    @driver
    def adapter_apply(self, model: Module, name: str, config: AdapterConfig, ctx: RunContext) -> Module:
        """★ Attach one under `name`: base frozen, earlier adapters kept, only its own parameters trainable. These are
        float32 whatever the base's type. With `Capabilities.new_tokens` the embedding rows `ctx.new_token_ids` are
        among them."""

    @driver
    def adapter_param_groups(self, model: Module, name: str, config: AdapterConfig) -> list[ParamGroup]:
        """★ Every trainable parameter of `name`, once, in a stable order, with its learning-rate ratio and decay."""

    @driver
    def adapter_activate(self, model: Module, weights: Mapping[str, float]) -> None:
        """★ Who acts on whole batches, and how strongly; `{}` gives the base's own outputs, to the bit."""

    @driver
    def adapter_route(
        self, model: Module, names: list[str], ids: Tensor, gates: Tensor | None
    ) -> AbstractContextManager[None]:
        """Inside, token (b, t) goes through adapters `names[ids[b, t, k]]`, weighted by `gates`; in training too.

        ids: (B, T, K) int64, -1 = none. gates: (B, T, K) float or None for equal to 1."""

    @driver
    def adapter_loss(self, model: Module, name: str) -> Tensor | None:
        """A scalar to add to the loss of this step (orthogonality, load balance), or None."""

    @driver
    def adapter_after_step(self, model: Module, name: str, step: int, total: int) -> None:
        """After optimizer step `step` of `total` (AdaLoRA moves its ranks here)."""

    @driver
    def adapter_save(
        self, model: Module, name: str, config: AdapterConfig, folder: Path, for_resume: bool
    ) -> list[Path]:
        """★ Write exactly the tensors of `adapter_param_groups` and what `adapter_load` needs; gives the files."""

    @driver
    def adapter_load(self, model: Module, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Module:
        """★ Inverse of save: checks base and shapes first (ArtifactError), then attaches under `name` as
        `adapter_apply` does: float32, and with the rows of the new tokens that were saved."""

    @driver
    def adapter_unload(self, model: Module, name: str) -> Module:
        """★ Take `name` out; when it was the last one, the base is bit-equal to what it was, and so is its class."""

    @driver
    def adapter_merge_weight(
        self, model: Module, name: str, module: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What a merged module would hold. weight: fp32 (out, in), bias: fp32 (out,) or None, in and out; the model
        stays as it is. The framework dequantizes before and quantizes after."""

    @driver
    def adapter_combine(
        self, model: Module, names: list[str], weights: list[float], method: str, options: Mapping[str, Any],
        new_name: str,
    ) -> None:  # fmt: skip
        """Merge adapters of this type into a new one. Across types the framework falls back on SVD of the deltas."""


class QuantizerSpecs:
    """Quantizers: how the base's weights are held in fewer bits."""

    @driver
    def quantizer_check(
        self, config: QuantizationConfig, model: ModelFacts, bits: BitPlan, device: str
    ) -> list[Problem]:
        """Torch-free. What stands against these bits on this base and device ("cuda", "mps", "cpu")."""

    @driver
    def quantizer_estimate(self, config: QuantizationConfig, model: ModelFacts, bits: BitPlan, dtype: str) -> Cost:
        """★ Torch-free. "weights" resident and `disk` of the whole model, in bytes, scales and zeros counted. What
        stays as it is (embeddings, norms, the head) is held in `dtype`, a Workload's."""

    @driver
    def quantizer_recognize(self, saved: Mapping[str, Any], model: ModelFacts) -> tuple[dict[str, Any], BitPlan]:
        """Torch-free. Options of this plugin's config (not `method`; "bits" and "group_size" where all modules agree)
        and the bits of a checkpoint, from the `quantization_config` in its config.json. Required with
        `provides.reads`, which names the `quant_method`s it is asked about."""

    @driver
    def quantizer_inference_dtype(self, config: QuantizationConfig, bits: BitPlan, device: str) -> str | None:
        """Torch-free. What a model so quantized answers in on a device ("cuda", "mps", "cpu") where nobody says:
        "float32", "bfloat16" or "float16", whichever the method's kernels are fast in. None: as other models there."""

    @driver
    def quantizer_prepare(
        self, source: Path, config: QuantizationConfig, bits: BitPlan,
        calibration: Iterable[Mapping[str, Tensor]] | None, folder: Path, ctx: RunContext,
    ) -> Path | None:  # fmt: skip
        """Quantize offline into `folder`, which is empty; gives what to load. None: this one quantizes while loading,
        or `source` is quantized already.

        calibration: tokenized rows, `input_ids` and `attention_mask`, int64 (B, T); None where the run has none."""

    @driver
    def quantizer_load_kwargs(
        self, source: Path, config: QuantizationConfig, bits: BitPlan, ctx: RunContext
    ) -> dict[str, Any]:
        """★ Keyword arguments for `AutoModelForCausalLM.from_pretrained`."""

    @driver
    def quantizer_after_load(self, model: Module, config: QuantizationConfig, bits: BitPlan, training: bool) -> Module:
        """★ Make a loaded model trainable under an adapter, and verify that it is quantized as planned."""

    @driver
    def quantizer_modules(self, model: Module) -> Mapping[str, QuantInfo]:
        """★ Bits and bytes really in force, by module name."""

    @driver
    def quantizer_fake_quantize(
        self, weight: Tensor, config: QuantizationConfig, bits: int, group_size: int, stats: Mapping[str, Tensor] | None
    ) -> Tensor:
        """weight (out, in) as it would come back from `bits`; same shape and dtype. For sensitivity. `stats`, for who
        provides `calibration`, if known: "second_moment", fp32 (in, in), mean of x xᵀ over inputs x of the module."""

    @driver
    def quantizer_dequantize(self, module: Module) -> Tensor:
        """The weight that forward uses: fp32 (out, in)."""

    @driver
    def quantizer_requantize(self, module: Module, weight: Tensor, config: QuantizationConfig, bits: int) -> Module:
        """A quantized module that holds `weight`, fp32 (out, in): after a merge."""

    @driver
    def quantizer_save(self, model: Module, config: QuantizationConfig, folder: Path) -> list[Path]:
        """★ Files that the method's own library reloads."""


class SchedulerSpecs:
    """Schedulers: the learning rate over time."""

    @driver
    def scheduler_check(self, config: PluginConfig, horizon: Horizon, learning_rate: float) -> list[Problem]:
        """Torch-free. What stands against this config over the run's horizon, whose `learning_rate` is the peak; called
        while the plan is resolved. Paths are relative to the scheduler's config ("num_cycles")."""

    @driver
    def scheduler_build(self, config: PluginConfig, optimizer: Optimizer, horizons: list[Horizon]) -> LRScheduler:
        """★ One horizon a parameter group, in order. Its `state_dict` resumes exactly."""


class CurriculumSpecs:
    """Curricula: which rows an epoch shows, and in what order."""

    @driver
    def curriculum_check(self, config: PluginConfig) -> list[Problem]:
        """Torch-free. What stands against this config; called while the plan is resolved. Paths are relative to it."""

    @driver
    def curriculum_score(
        self, config: PluginConfig, rows: RowFacts, model: Module | None, ctx: RunContext
    ) -> numpy.ndarray:
        """Difficulty of each row: (N,) from 0 (easy) to 1 (hard). Computed once, before packing, and cached."""

    @driver
    def curriculum_order(
        self, config: PluginConfig, scores: numpy.ndarray, lengths: numpy.ndarray, epoch: int, epochs: int, seed: int
    ) -> numpy.ndarray:
        """★ Row indices of `epoch` (from 0), int64. A pure function of its arguments, so that resume is exact."""


class ObjectiveSpecs:
    """Objectives: what is learnt from a row."""

    @driver
    def objective_check(self, config: PluginConfig) -> list[Problem]:
        """Torch-free. What stands against this config; called while the plan is resolved. Paths are relative to it."""

    @driver
    def objective_sequences(self, config: PluginConfig, row: Mapping[str, Any]) -> list[Sequence]:
        """★ Torch-free. What the model reads of one row of `DatasetProcessor`: one sequence for SFT, two for DPO."""

    @driver
    def objective_needs_reference(self, config: PluginConfig) -> bool:
        """Whether `reference` is wanted: the base's log-probabilities, adapters off."""

    @driver
    def objective_loss(
        self,
        config: PluginConfig,
        logps: Tensor,
        segments: Segments,
        scores: TokenScores,
        reference: Tensor | None,
        normalizer: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """★ Scalar loss and metrics. logps, reference: (N,) fp32 log-probabilities of the supervised tokens of one
        micro-batch; scores: what else of the logits a loss may use (label smoothing, z-loss); normalizer: supervised
        tokens of the whole optimizer step, so that the micro-batches' losses add up to the step's."""


class StrategySpecs:
    """Strategies: one run on many devices."""

    @driver
    def strategy_check(self, config: PluginConfig, plan: Plan, world: World) -> list[Problem]:
        """Torch-free. What stands against this plan on this world."""

    @driver
    def strategy_estimate(self, config: PluginConfig, cost: Cost, world: World) -> Cost:
        """★ Torch-free. `cost` of one process alone, turned into the cost of each rank."""

    @driver
    def strategy_launch(self, config: PluginConfig, argv: list[str], world: World) -> LaunchSpec:
        """Torch-free and pure. Command lines and environments of this node's processes."""

    @driver
    def strategy_load_kwargs(self, config: PluginConfig, world: World) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained` (meta device, `tp_plan`, ZeRO-3)."""

    @driver
    def strategy_training_args(self, config: PluginConfig, plan: Plan) -> dict[str, Any]:
        """Fields of `transformers.TrainingArguments` (`deepspeed`, `fsdp`)."""

    @driver
    def strategy_setup(
        self, model: Module, config: PluginConfig, mesh: torch.distributed.DeviceMesh | None, ctx: RunContext
    ) -> Module:
        """★ Shard or wrap, after the adapter and before the optimizer is built."""

    @driver
    def strategy_in_force(self, model: Module, optimizer: Optimizer) -> InForce:
        """★ Measured, not recalled: strategy, world, shards, dtypes. Compared with the plan."""

    @driver
    def strategy_gather(self, model: Module, names: list[str]) -> AbstractContextManager[None]:
        """★ Inside, the named parameters are whole: to save and to merge."""

    @driver
    def strategy_save(self, model: Module, optimizer: Optimizer, folder: Path) -> None:
        """Sharded, may be asynchronous."""

    @driver
    def strategy_load(self, model: Module, optimizer: Optimizer, folder: Path) -> None:
        """Inverse of save, on any world size."""

    @driver
    def strategy_consolidate(self, folder: Path, out: Path) -> Path:
        """Offline: shards into the files that one process would have written."""


class DeploySpecs:
    """Deploy targets: where a packaged model goes."""

    @driver
    def deploy_check(self, config: PluginConfig, package: PackageFacts) -> list[Problem]:
        """Torch-free, no network. What stands against sending this package; paths are relative to the config."""

    @driver
    def deploy_optimize(
        self, config: PluginConfig, package: PackageFacts, folder: Path, ctx: RunContext
    ) -> PackageFacts:
        """The target's own post-training optimization into `folder`; the parity gate follows."""

    @driver
    def deploy_render(self, config: PluginConfig, package: PackageFacts) -> Mapping[str, bytes | FileRef]:
        """★ Pure: every file that will be sent, by relative path; those of the package by reference. No secret and
        no path of this machine is among it: the same package gives the same bytes, wherever it lies."""

    @driver
    def deploy_apply(
        self, config: PluginConfig, rendered: Mapping[str, bytes | FileRef], state: MutableMapping[str, Any],
        ctx: RunContext,
    ) -> Deployment:  # fmt: skip
        """★ Send; after an interruption, go on. `state` is empty at first; what is assigned to its keys, plain JSON
        data, is kept at once and given again when the same files are sent again."""

    @driver
    def deploy_status(self, config: PluginConfig, id: str) -> Deployment:
        """★ How it is doing: "running" means that all of it is there. "deleted" is what is not there, whether it ever
        was or not; what cannot be an id of this target may be a HyperionError."""

    @driver
    def deploy_delete(self, config: PluginConfig, id: str) -> None:
        """★ Gone afterwards; deleting what is gone already is no error."""


class BenchmarkSpecs:
    """Benchmarks, [all] chosen: how good a model is."""

    @hookspec
    def benchmark_tasks(self, config: PluginConfig) -> list[str]:
        """★ Torch-free. Names of the tasks that it can run."""

    @hookspec
    def benchmark_run(
        self, config: PluginConfig, tasks: list[str], model: LanguageModel, limit: int | None, batch_size: int,
        ctx: RunContext,
    ) -> list[Score]:  # fmt: skip
        """★ `limit` is items a task. `model` may be live, packaged, or an endpoint."""


class TrackerSpecs:
    """Trackers, [all] chosen: where a run's figures go."""

    @hookspec
    def tracker_start(self, plan: Plan, ctx: RunContext) -> None:
        """★ Once, before the first step."""

    @hookspec
    def tracker_log(self, metrics: Mapping[str, float], step: int) -> None:
        """★ Figures of an optimizer step."""

    @hookspec
    def tracker_file(self, path: Path) -> None:
        """A file of the artifact."""

    @hookspec
    def tracker_end(self, status: str) -> None:
        """Once: "done", "failed" or "interrupted"."""


class GuardSpecs:
    """Safeguards, [all] chosen. Each implements one hook or more. An exception in one stops the run."""

    @hookspec
    def guard_data(self, rows: Iterable[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict a row, before tokenizing."""

    @hookspec
    def guard_text(self, prompt: str, text: str, where: str) -> list[Verdict]:
        """Verdicts on one answer. `where`: "server", "chat" or "test"."""

    @hookspec
    def guard_model(self, model: LanguageModel, base: LanguageModel, ctx: RunContext) -> list[Score]:
        """A gate before packaging: the tuned model beside its base."""


class RunSpecs:
    """Observers, [all] named in `plugins:`. Read-only: an exception warns once and mutes that observer."""

    @hookspec
    def run_start(self, plan: Plan, ctx: RunContext) -> None:
        """The plan stands; nothing is loaded yet."""

    @hookspec
    def run_model_ready(self, model: Module, in_force: InForce, ctx: RunContext) -> None:
        """Base and adapter are in place; the optimizer is not built yet."""

    @hookspec
    def run_step(self, step: int, metrics: Mapping[str, float], ctx: RunContext) -> None:
        """After each logged optimizer step."""

    @hookspec
    def run_evaluate(self, metrics: Mapping[str, float], step: int, ctx: RunContext) -> None:
        """After each evaluation."""

    @hookspec
    def run_checkpoint(self, path: Path, step: int, ctx: RunContext) -> None:
        """A checkpoint is complete at `path`."""

    @hookspec
    def run_error(self, error: BaseException, ctx: RunContext) -> None:
        """The run ends with `error`, which is raised after this."""

    @hookspec
    def run_end(self, artifact: Artifact, ctx: RunContext) -> None:
        """The artifact is complete."""


ALL_SPECS = (
    AdapterSpecs,
    QuantizerSpecs,
    SchedulerSpecs,
    CurriculumSpecs,
    ObjectiveSpecs,
    StrategySpecs,
    DeploySpecs,
    BenchmarkSpecs,
    TrackerSpecs,
    GuardSpecs,
    RunSpecs,
)


def hook_names(specs: type) -> tuple[str, ...]:
    """The hooks of one class above, in its order."""
    return tuple(name for name in vars(specs) if not name.startswith("_"))


def required_hooks(specs: type) -> tuple[str, ...]:
    """The hooks marked ★: the page above is where that is decided."""
    return tuple(name for name in hook_names(specs) if (vars(specs)[name].__doc__ or "").startswith("★"))
