"""Low-rank updates for linear modules: y = W·x + (alpha / r) · B·A·x, where only A and B train.

Written on Hyperion's contract alone. Change the mathematics in `_update`, `_add_updates` and
`adapter_merge_weight`; the other hooks then mostly stay as they are. Source of the method: LoRA, arXiv 2106.09685.

torch is imported inside the functions that need it, so that planning a run stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperion_core.artifact import read_json, write_json
from hyperion_core.config import AdapterConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import ArtifactError, CompatibilityError, Problem
from hyperion_core.facts import Capabilities, Cost, ModelFacts, ModuleFact, ParamGroup, Workload
from hyperion_core.kinds import Adapter
from pydantic import Field, PositiveFloat, PositiveInt

__all__ = ["ChangemeAdapter", "ChangemeConfig"]

HOME = "changeme_adapter"  # the submodule of each adapted linear that holds the updates, by adapter name
WEIGHTS, SETTINGS = "changeme_adapter.safetensors", "changeme_adapter.json"


class ChangemeConfig(AdapterConfig):
    """What a user may write below `adapter:`. Unknown keys are refused with a suggestion."""

    type: str = "changeme"
    r: PositiveInt = Field(8, description="Rank of the update.")
    alpha: PositiveFloat = Field(16.0, description="Strength: the update is multiplied by alpha / r.")
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1, description="Names, or last parts of names.")


class ChangemeAdapter(Adapter):
    """Several may live in one model under different names; the base itself is never changed."""

    config_class = ChangemeConfig
    capabilities = Capabilities(mergeable=True)

    # --- planning: no torch here ---

    def adapter_check(self, config: ChangemeConfig, model: ModelFacts) -> list[Problem]:
        if not model.known or _targets(config, model):
            return []
        fix = f"this base has: {', '.join(model.short_names())}"
        return [Problem("target_modules", "no linear module of the base has one of these names", fix=fix)]

    def adapter_targets(self, config: ChangemeConfig, model: ModelFacts) -> list[str]:
        found = [module.name for module in _targets(config, model)]
        if not found:
            raise CompatibilityError(
                f"{model.source} has no linear module called {' or '.join(config.target_modules)}",
                fix=f"give target_modules out of: {', '.join(model.short_names())}",
            )
        return found

    def adapter_estimate(self, config: ChangemeConfig, model: ModelFacts, work: Workload) -> Cost:
        shapes = [module.shape for module in _targets(config, model)]
        tokens = work.batch * work.length
        copied = work.dtype != "float32"  # the input, which `_add_updates` needs in float32
        return Cost({
            "adapter": 4 * sum(config.r * (rows + columns) for rows, columns in shapes),  # float32
            "activations": 4 * tokens * sum(config.r + copied * columns for _, columns in shapes),
        })  # fmt: skip

    # --- training ---

    def adapter_apply(self, model: Any, name: str, config: ChangemeConfig, ctx: RunContext) -> Any:
        import torch
        from hyperion_core.live_facts import live_model_facts

        model.requires_grad_(False)
        # A generator of its own: the same seed gives the same start, and the run's random numbers stay as they are.
        generator = torch.Generator().manual_seed(ctx.seed)
        for target in self.adapter_targets(config, live_model_facts(model)):
            module = model.get_submodule(target)
            if not hasattr(module, HOME):
                module.add_module(HOME, torch.nn.ModuleDict())
                getattr(module, HOME).handle = module.register_forward_hook(_add_updates)
            getattr(module, HOME)[name] = _update(module, config, generator)
        self.adapter_activate(model, {name: 1.0})
        return model

    def adapter_param_groups(self, model: Any, name: str, config: ChangemeConfig) -> list[ParamGroup]:
        found = [
            (f"{path}.{HOME}.{name}.{letter}", update[letter])
            for path, update in _updates(model, name)
            for letter in ("A", "B")
        ]
        return [ParamGroup(name, tuple((key, tensor) for key, tensor in found if tensor.requires_grad))]

    def adapter_activate(self, model: Any, weights: Mapping[str, float]) -> None:
        for module in model.modules():
            for name, update in getattr(module, HOME, {}).items():
                update.strength = weights.get(name, 0.0)

    # --- files ---

    def adapter_save(self, model: Any, name: str, config: ChangemeConfig, folder: Path) -> list[Path]:
        from safetensors.torch import save_file

        tensors = {
            f"{path}.{letter}": update[letter].detach().cpu().contiguous()
            for path, update in _updates(model, name)
            for letter in ("A", "B")
        }
        save_file(tensors, folder / WEIGHTS)
        return [folder / WEIGHTS, write_json(folder / SETTINGS, config.model_dump())]

    def adapter_load(self, model: Any, name: str, folder: Path, trainable: bool, ctx: RunContext) -> Any:
        import torch
        from hyperion_core.live_facts import live_model_facts
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = ChangemeConfig.parse(read_json(folder / SETTINGS), source=str(folder / SETTINGS))
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder / WEIGHTS} cannot be read", why=str(error)) from error
        # Everything is compared before anything is touched: a base that does not fit stays as it was.
        expected: dict[str, tuple[int, ...]] = {}
        for module in _targets(config, live_model_facts(model)):
            rows, columns = module.shape
            expected |= {f"{module.name}.A": (config.r, columns), f"{module.name}.B": (rows, config.r)}
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != expected:
            raise ArtifactError(
                f"the adapter in {folder} does not fit this base",
                why="its tensors have other names or sizes than the modules of the base",
                fix="load the base that it was trained on",
            )
        model = self.adapter_apply(model, name, config, ctx)
        with torch.no_grad():
            for path, update in _updates(model, name):
                for letter in ("A", "B"):
                    update[letter].copy_(tensors[f"{path}.{letter}"])
                    update[letter].requires_grad_(trainable)
        return model

    # --- leaving ---

    def adapter_unload(self, model: Any, name: str) -> Any:
        for path, _ in list(_updates(model, name)):
            module = model.get_submodule(path)
            home = getattr(module, HOME)
            del home[name]
            if not home:  # the last one takes the hook with it
                home.handle.remove()
                delattr(module, HOME)
        return model

    def adapter_merge_weight(self, model: Any, name: str, module: str, weight: Any, bias: Any) -> tuple[Any, Any]:
        """weight: fp32 (out, in); gives what a plain linear module must hold to act as this one does."""
        update = getattr(model.get_submodule(module), HOME)[name]
        product = update["B"].detach() @ update["A"].detach()
        return weight + update.scale * product.to(weight.device), bias


def _targets(config: ChangemeConfig, model: ModelFacts) -> list[ModuleFact]:
    return [module for module in model.matching(config.target_modules) if module.kind == "linear"]


def _updates(model: Any, name: str) -> list[tuple[str, Any]]:
    """(module's name, update) of every module that the adapter `name` touches, in the order of the model."""
    return [(path, getattr(m, HOME)[name]) for path, m in model.named_modules() if name in getattr(m, HOME, ())]


def _update(module: Any, config: ChangemeConfig, generator: Any) -> Any:
    """A: (r, in), random. B: (out, r), zeros, so that training starts from the base's own outputs."""
    import torch

    device = module.weight.device
    start = torch.randn(config.r, module.in_features, generator=generator) / module.in_features**0.5
    pair = {"A": start.to(device), "B": torch.zeros(module.out_features, config.r, device=device)}
    update: Any = torch.nn.ParameterDict(pair)
    update.scale = config.alpha / config.r
    update.strength = 1.0
    return update


def _add_updates(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """A forward hook. inputs[0]: (..., in), output: (..., out)."""
    for update in getattr(module, HOME).values():
        if update.strength:
            x = inputs[0].to(update["A"].dtype)
            change = x @ update["A"].T @ update["B"].T
            output = output + (update.strength * update.scale * change).to(output.dtype)
    return output
