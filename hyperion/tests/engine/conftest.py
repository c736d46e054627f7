"""A tiny run: random models, ragged rows, and an adapter of our own: the engine is seen to assume no library."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset
from hyperion_core.config import AdapterConfig, PluginConfig
from hyperion_core.context import RunContext
from hyperion_core.facts import ParamGroup
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Adapter, Objective, Observer, Scheduler
from hyperion_core.plan import Plan
from hyperion_core.registry import Registry
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


class LowRankConfig(AdapterConfig):
    type: str = "lowrank"
    rank: int = 4
    dropout: float = 0.0
    lr_ratio: float = 1.0


class LowRank(Adapter):
    """b·a beside some linear modules, by forward hooks: the module keeps its class, and the model its structure."""

    config_class = LowRankConfig

    def modules(self, model):
        return {
            n: m for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj")) and isinstance(m, nn.Linear)
        }

    def adapter_targets(self, config, model):
        return []

    def adapter_estimate(self, config, model, work):
        raise AssertionError("planning is not tested here")

    def adapter_apply(self, model, name, config, ctx):
        model.requires_grad_(False)
        for module in self.modules(model).values():
            module.lowrank_a = nn.Parameter(torch.randn(config.rank, module.in_features, dtype=torch.float32) * 0.2)
            module.lowrank_b = nn.Parameter(torch.randn(module.out_features, config.rank, dtype=torch.float32) * 0.05)
            module.lowrank_drop = nn.Dropout(config.dropout)
            module.lowrank_on = True
            module.lowrank_hook = module.register_forward_hook(_add)
        return model

    def adapter_param_groups(self, model, name, config):
        def named(part):
            return tuple((f"{n}.{part}", getattr(m, part)) for n, m in self.modules(model).items())

        return [
            ParamGroup("a", named("lowrank_a")),
            ParamGroup("b", named("lowrank_b"), lr_ratio=config.lr_ratio, weight_decay=0.0),
        ]

    def adapter_activate(self, model, weights):
        for module in self.modules(model).values():
            module.lowrank_on = bool(weights)

    def adapter_save(self, model, name, config, folder, for_resume):
        tensors = {
            n: p.detach().contiguous() for g in self.adapter_param_groups(model, name, config) for n, p in g.parameters
        }
        save_file(tensors, folder / "lowrank.safetensors")
        (folder / "config.json").write_text(config.model_dump_json())
        return [folder / "lowrank.safetensors", folder / "config.json"]

    def adapter_load(self, model, name, folder, trainable, ctx):
        config = LowRankConfig.model_validate_json((folder / "config.json").read_text())
        model = self.adapter_apply(model, name, config, ctx)
        tensors = load_file(folder / "lowrank.safetensors")
        with torch.no_grad():
            for group in self.adapter_param_groups(model, name, config):
                for key, parameter in group.parameters:
                    parameter.copy_(tensors[key])
                    parameter.requires_grad_(trainable)
        return model

    def adapter_unload(self, model, name):
        for module in self.modules(model).values():
            module.lowrank_hook.remove()
            for part in ("lowrank_a", "lowrank_b", "lowrank_drop", "lowrank_on", "lowrank_hook"):
                delattr(module, part)
        return model


def _add(module, arguments, output):
    if not module.lowrank_on:
        return output
    x = module.lowrank_drop(arguments[0].to(module.lowrank_a.dtype))
    return output + (x @ module.lowrank_a.T @ module.lowrank_b.T).to(output.dtype)


class MeanNegative(Objective):
    def objective_sequences(self, config, row):
        return []

    def objective_loss(self, config, logps, segments, normalizer):
        return -logps.sum() / normalizer, {"likelihood": logps.exp().sum() / normalizer}


class Linear(Scheduler):
    def scheduler_build(self, config, optimizer, horizons):
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            [lambda step, h=h: min((step + 1) / max(h.warmup, 1), 1 - step / (2 * h.total)) for h in horizons],
        )


class Recorder(Observer):
    def __init__(self):
        self.calls = []

    def run_model_ready(self, model, in_force, ctx):
        self.calls.append(("ready", in_force))

    def run_step(self, step, metrics, ctx):
        self.calls.append(("step", step))

    def run_evaluate(self, metrics, step, ctx):
        self.calls.append(("evaluate", step))

    def run_checkpoint(self, path, step, ctx):
        assert (path / "complete.json").is_file()
        self.calls.append(("checkpoint", step))


class Tokenizer:
    """As much of a tokenizer as samples need."""

    pad_token_id = 0
    eos_token_id = 1

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"t{i}" for i in ids)


def ragged_rows(count=22, seed=0, shortest=4, longest=14) -> Dataset:
    """Rows of unlike lengths, a third to all of each supervised; some supervise even their first token."""
    draw = numpy.random.default_rng(seed)
    rows = {"input_ids": [], "labels": [], "length": []}
    for _ in range(count):
        length = int(draw.integers(shortest, longest + 1))
        start = int(draw.integers(0, length - 1))
        ids = draw.integers(2, VOCABULARY, length).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * start + ids[start:])
        rows["length"].append(length)
    return Dataset.from_dict(rows)


def tiny_llama(seed=0, tied=False, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class TinyRun:
    """One run in a folder; `fit()` starts it, and again with `resume`."""

    def __init__(self, folder: Path, *, config: LowRankConfig | None = None, train=None, evaluation=None, **arguments):
        self.folder = folder
        self.config = config or LowRankConfig()
        self.train = train if train is not None else ragged_rows()
        self.evaluation = evaluation
        self.recorder = Recorder()
        self.arguments = {
            "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
            "gradient_accumulation_steps": 2, "logging_steps": 2, "save_steps": 4, "save_strategy": "steps", "seed": 3,
            "use_cpu": True, **arguments,
        }  # fmt: skip
        registry = Registry()
        self.hooks = RunHooks()
        for plugin, name in ((LowRank, "lowrank"), (MeanNegative, "mean"), (Linear, "linear")):
            registry.add(plugin, name)
            self.hooks.add(registry.load(plugin.kind, name)(), name)
        self.hooks.add(self.recorder, "recorder")
        plan = Plan(config={}, choices=(), device="cpu", dtype="float32")
        self.ctx = RunContext(plan, 3, "cpu", folder, folder / "cache", log=logging.getLogger("test"))

    @property
    def adapter(self):
        return self.hooks.adapter("lowrank")

    def model(self, resume: Path | None = None):
        base = tiny_llama()
        if resume is not None:
            return self.adapter.adapter_load(
                model=base, name="default", folder=resume / "adapter", trainable=True, ctx=self.ctx
            )
        torch.manual_seed(1)
        return self.adapter.adapter_apply(model=base, name="default", config=self.config, ctx=self.ctx)

    def fit(self, resume: Path | None = None, model=None, patience=None, samples=0, **speed):
        from hyperion.engine.fit import Speed, fit

        return fit(
            model if model is not None else self.model(resume), Tokenizer(), self.train, self.evaluation,
            arguments=self.arguments, hooks=self.hooks, ctx=self.ctx, adapter=("lowrank", self.config),
            objective=("mean", PluginConfig()), scheduler=("linear", PluginConfig()),
            early_stopping_patience=patience, eval_samples=samples, eval_samples_max_new_tokens=5,
            speed=Speed(**speed), resume=resume,
        )  # fmt: skip

    def lines(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def trained(self, model) -> dict[str, torch.Tensor]:
        groups = self.adapter.adapter_param_groups(model=model, name="default", config=self.config)
        return {name: parameter.detach().clone() for group in groups for name, parameter in group.parameters}


@pytest.fixture(scope="session")
def tiny():
    """The parts above, for tests to build with."""
    return SimpleNamespace(
        Run=TinyRun, LowRank=LowRank, LowRankConfig=LowRankConfig, rows=ragged_rows, llama=tiny_llama
    )
