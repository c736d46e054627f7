"""The forecast of memory, against what the libraries really hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyperion.optimization.memory_model import optimizer_bytes


@pytest.mark.parametrize(
    "name",
    [
        "adamw_torch",
        "sgd",
        "adafactor",
        "adagrad",
        "rmsprop",
        "adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "ademamix",
        "muon",
    ],
)
def test_the_optimizer_keeps_what_is_forecast(name: str) -> None:
    torch = pytest.importorskip("torch")
    if "8bit" in name or name.startswith(("paged", "lion", "ademamix")):
        pytest.importorskip("bitsandbytes")
    from hyperion.engine.arguments import optimizer_class, training_arguments

    weight = torch.nn.Parameter(torch.randn(256, 512))
    kind, options = optimizer_class(training_arguments({"output_dir": "unused", "optim": name, "use_cpu": True}))
    optimizer = kind([weight], **options)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    held = {
        id(x): x.nbytes for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor) and x.numel() > 256
    }
    said = optimizer_bytes(weight.nbytes, name)
    assert said == pytest.approx(sum(held.values()), rel=0.1, abs=weight.nbytes / 50)


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """Plans a run on a tiny base of four layers, 32 wide: eight rows of 64 tokens."""
    for module in ("transformers", "hyperion_adapters_lora"):
        pytest.importorskip(module)
    from hyperion_core.testing.tiny import save_tiny_base

    from hyperion.config import FinetuneConfig
    from hyperion.planning import make_plan

    save_tiny_base(tmp_path / "base", num_hidden_layers=4)

    def plan(adapter: dict[str, Any] | None = None, new_tokens: tuple[str, ...] = (), **training: Any) -> Any:
        adapter = {"type": "lora", "target_modules": ["q_proj", "v_proj"], **(adapter or {})}
        training = {"max_length": 64, "per_device_train_batch_size": 8, **training}
        data = {"base_model": str(tmp_path / "base"), "dtype": "float32", "adapter": adapter, "training": training}
        return make_plan(FinetuneConfig.parse({**data, "new_tokens": list(new_tokens)}), device="cpu").plan

    return plan


def test_the_plan_counts_what_the_adapter_says_of_itself(planned: Any) -> None:
    plain, dropping, frozen = (planned(a) for a in ({}, {"lora_dropout": 0.05}, {"init_lora_weights": "pissa"}))
    # a byte for each number that goes into one of eight modules
    assert dropping.memory["activations"] - plain.memory["activations"] == 8 * 64 * 8 * 32
    assert frozen.memory["adapter"] == 2 * plain.memory["adapter"]
    assert frozen.trainable == plain.trainable
    assert frozen.memory["gradients"] == plain.memory["gradients"]
    assert frozen.memory["activations"] > plain.memory["activations"]


def test_layers_below_the_first_that_learns_keep_nothing_and_free_nothing(planned: Any) -> None:
    def kept(layers: int, **more: Any) -> int:
        top = {"layers_to_transform": [2, 3], "lora_dropout": 0.05}
        return planned(top, recompute_layers=layers, **more).memory["activations"]

    assert kept(0) == kept(2)
    assert kept(4) < kept(0) < planned({"lora_dropout": 0.05}).memory["activations"]
    assert kept(0, new_tokens=("<new>",)) > 1.5 * kept(0)  # their gradient flows through all layers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_that_pads_is_forecast_as_one(device: str, planned: Any) -> None:
    from hyperion_core.facts import ModelFacts

    from hyperion.memory import planned_step
    from hyperion.training_config import TrainingConfig

    def step(**more: Any) -> Any:
        rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, **more}
        return planned_step(TrainingConfig.parse(rows), ModelFacts("some"), 512, "float32", device)

    assert step(neftune_noise_alpha=5.0) == step(packing=False) != step()
    assert planned(neftune_noise_alpha=5.0).memory == planned(packing=False).memory != planned().memory
