"""One quantizer tried on one small base: loading as a run loads, and what is then asked of the model."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from ..config import QuantizationConfig
from ..context import RunContext
from ..errors import HyperionError
from ..facts import BitPlan, ModelFacts, QuantInfo
from ..kinds import Quantizer
from ..live_facts import live_model_facts
from ..specs import QuantizerSpecs
from .planning import planning
from .resident import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

NEAR = 0.05  # how far an estimate may be from the truth
UNQUANTIZED = 16
GROUPS = (32, 64)  # one of them is none that the method would take by itself
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})

Calibration = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """`source` is the base's folder, `facts` what planning knows of it, `options` those of the config; in `kept`, what
    was quantized offline stays for other tests."""

    plugin: type[Quantizer]
    hooks: QuantizerSpecs
    source: Path
    ctx: RunContext
    options: Mapping[str, Any]
    rows: Callable[[], Calibration]
    kept: Path | None = None

    @cached_property
    def base(self) -> Any:
        """The unquantized model."""
        return self.from_pretrained(self.source)

    @cached_property
    def facts(self) -> ModelFacts:
        return live_model_facts(self.base)

    @property
    def widths(self) -> list[int]:
        """The bits that it declares, without those that leave a weight as it is."""
        return sorted(self.plugin.provides.bits - {UNQUANTIZED})

    @property
    def narrow(self) -> BitPlan:
        """The fewest bits everywhere."""
        return BitPlan(self.widths[0], 0)

    @property
    def plans(self) -> list[BitPlan]:
        """Every width in the method's own groups, and the fewest bits in groups of each size that it can do."""
        grouped = [BitPlan(self.widths[0], group) for group in GROUPS]
        return [*(BitPlan(bits, 0) for bits in self.widths), *(plan for plan in grouped if not self.problems(plan))]

    @property
    def mixed(self) -> BitPlan:
        """Bits by module: the fewest, the most, and some left as they are."""
        most, one = (self.widths[-1], 0), "model.layers.0.self_attn.q_proj"
        return BitPlan(self.widths[0], 0, {one: (UNQUANTIZED, 0), "*.down_proj": most, "*.k_proj": (UNQUANTIZED, 0)})

    def config(self, plan: BitPlan) -> QuantizationConfig:
        """The suite's options with the plan's bits, and its group size where it has one."""
        group = {"group_size": plan.group_size} if plan.group_size else {}
        parsed = self.plugin.config_class.parse({**self.options, "bits": plan.bits, **group})
        return cast(QuantizationConfig, parsed)

    # --- planning ---

    def problems(self, plan: BitPlan, *, facts: ModelFacts | None = None, device: str = "") -> str:
        """What the config, or `quantizer_check`, has against a plan; "" for nothing."""
        facts = self.facts if facts is None else facts
        try:
            config = self.config(plan)
        except HyperionError as error:
            return str(error)
        with planning("quantizer_check"):
            found = self.hooks.quantizer_check(config=config, model=facts, bits=plan, device=device or self.ctx.device)
        return "; ".join(map(str, found or []))

    def estimate(self, plan: BitPlan, dtype: str) -> tuple[int, int]:
        """Bytes in memory and on disk, as planned."""
        facts, config = self.facts, self.config(plan)
        with planning("quantizer_estimate"):
            cost = self.hooks.quantizer_estimate(config=config, model=facts, bits=plan, dtype=dtype)
        return cost.memory.get("weights", 0), cost.disk

    # --- loading, step by step as a run does ---

    def load(self, plan: BitPlan | None = None, *, source: Path | None = None, dtype: str = "float32") -> Module:
        """The base, quantized, and made ready to be trained on."""
        plan = plan or self.narrow
        return self.after_load(self.from_pretrained(self._prepared(plan, source), plan, dtype=dtype), plan)

    def _prepared(self, plan: BitPlan, source: Path | None) -> Path:
        """As between runs: what one instance of the plugin has quantized offline, the next one loads."""
        if source or self.kept is None:
            return self._prepared_in(self.ctx.cache, plan, source)
        done = self.kept / hashlib.sha256(repr((self.config(plan), plan)).encode()).hexdigest()[:16]
        if not done.exists():
            prepared = self._prepared_in(self.kept, plan, None)
            if prepared == self.source:
                return prepared
            prepared.rename(done)
        return done

    def _prepared_in(self, parent: Path, plan: BitPlan, source: Path | None) -> Path:
        rows = self.rows() if self.plugin.provides.calibration else None
        parent.mkdir(parents=True, exist_ok=True)
        return self.prepare(plan, Path(tempfile.mkdtemp(dir=parent)), rows, source=source)

    def prepare(self, plan: BitPlan, folder: Path, rows: Calibration | None, *, source: Path | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        start = source or self.source
        prepared = self.hooks.quantizer_prepare(
            source=start, config=self.config(plan), bits=plan, calibration=rows, folder=folder, ctx=self.ctx
        )
        return prepared or start

    def from_pretrained(self, folder: Path, plan: BitPlan | None = None, *, dtype: str = "float32") -> Module:
        """Without a plan, as it lies there: the unquantized base."""
        import torch
        from transformers import AutoModelForCausalLM

        kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        if self.ctx.device != "cpu":
            kwargs["device_map"] = {"": self.ctx.device}
        if plan is not None:
            kwargs |= self.hooks.quantizer_load_kwargs(source=folder, config=self.config(plan), bits=plan, ctx=self.ctx)
        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs, use_safetensors=True, local_files_only=True)
        return cast("Module", model)

    def after_load(self, model: Module, plan: BitPlan) -> Module:
        model = self.hooks.quantizer_after_load(model=model, config=self.config(plan), bits=plan, training=True)
        return model.eval()

    def save(self, model: Module, plan: BitPlan, folder: Path) -> list[Path]:
        """Save into `folder`, which is made; gives the files, having looked that these are all, and safe ones."""
        folder.mkdir(parents=True)
        paths = self.hooks.quantizer_save(model=model, config=self.config(plan), folder=folder)
        written = {path for path in folder.rglob("*") if path.is_file()}
        assert written == {Path(path) for path in paths}, (
            f"quantizer_save answers with {sorted(map(str, paths))}, and wrote {sorted(map(str, written))}"
        )
        pickled = [path.name for path in written if path.suffix in PICKLES]
        assert not pickled, f"weights are saved as pickles, which can run code: {pickled}; use safetensors"
        return sorted(written)

    # --- what is in the model ---

    def infos(self, model: Module) -> dict[str, QuantInfo]:
        """What `quantizer_modules` says is quantized."""
        found = self.hooks.quantizer_modules(model=model)
        return {name: info for name, info in found.items() if info.bits != UNQUANTIZED}

    def weight(self, module: Module, name: str) -> Tensor:
        """What `quantizer_dequantize` gives, having looked at its type."""
        import torch

        given: Any = module
        weight = self.hooks.quantizer_dequantize(module=module)
        assert weight.dtype == torch.float32 and tuple(weight.shape) == (given.out_features, given.in_features), (
            f"quantizer_dequantize gives {tuple(weight.shape)} {weight.dtype} for {name}, not fp32 (out, in)"
        )
        return weight.detach()

    def original(self, name: str) -> Tensor:
        """The unquantized weight of a module."""
        return cast("Tensor", self.base.get_submodule(name).weight).detach()

    def distance_from_base(self, model: Module) -> float:
        """Of the weights, or of the logits where the weights are not handed out."""
        if not self.plugin.provides.dequantize:
            return (logits(model) - logits(self.base)).norm().item()
        return math.hypot(
            *((self.weight(model.get_submodule(name), name) - self.original(name)).norm().item()
              for name in self.infos(model))
        )  # fmt: skip

    def assert_as_planned(self, model: Module, plan: BitPlan) -> None:
        """Reported is what is planned, and the tensors bear it out."""
        infos = self.infos(model)
        expected = {module.name: plan.of(module.name) for module in self.facts.linear()}
        expected = {name: pair for name, pair in expected.items() if pair[0] != UNQUANTIZED}
        missing, extra = sorted(set(expected) - set(infos)), sorted(set(infos) - set(expected))
        assert not missing, f"the plan quantizes these modules, and quantizer_modules lacks them: {missing[:5]}"
        assert not extra, f"quantizer_modules lists modules that the plan leaves as they are: {extra[:5]}"
        for name, (bits, group) in expected.items():
            info, module = infos[name], cast(Any, model.get_submodule(name))
            assert info.bits == bits, f"the plan gives {name} {bits} bits, and quantizer_modules reports {info.bits}"
            assert not group or info.group_size == group, (
                f"the plan gives {name} groups of {group}, and quantizer_modules reports {info.group_size}"
            )
            held = resident_bytes(module)
            assert math.isclose(info.nbytes, held, rel_tol=NEAR), (
                f"quantizer_modules reports {info.nbytes:,} bytes for {name}, and it holds {held:,}"
            )
            columns = module.in_features
            each = 8 * held / (module.out_features * columns)
            assert each <= 2 * bits + 2, f"{name} is reported with {bits} bits, and holds {each:.1f} bits a weight"
            if self.plugin.provides.dequantize:
                groups = math.ceil(columns / info.group_size) if info.group_size > 0 else 1
                row = self.weight(module, name)[0]
                values = row.unique().numel()
                assert values <= groups * 2**bits, (
                    f"{name} is reported with {bits} bits, and a row of {groups} groups has {values} different values"
                )


def batch() -> Tensor:
    """Token ids (4, 12), the same every time."""
    import torch

    return torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Module) -> Tensor:
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        return cast("Tensor", model.eval()(input_ids=batch().to(device)).logits).cpu()


def loss(model: Module) -> Tensor:
    ids = batch().to(next(model.parameters()).device)
    return cast("Tensor", model(input_ids=ids, labels=ids).loss)


def skip_unless(condition: bool, what: str) -> None:
    if not condition:
        pytest.skip(what)
