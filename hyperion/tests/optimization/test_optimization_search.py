"""Settings that fit, from a config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import CompatibilityError, ConfigError
from hyperion_core.facts import MiB

pytest.importorskip("hyperion_adapters_lora")

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A Llama-2-70B of which there is a config.json only."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    return folder


def test_a_70b_is_planned_from_its_config_without_torch(large: Path) -> None:
    code = (
        "import sys; from hyperion.optimization import AdapterOptimizer\n"
        f"found = AdapterOptimizer({str(large)!r}, 200 * 1024).generate_config()\n"
        "assert found.adapter.r >= 16 and found.quantization.bits in (4, 8, 16) and found.training.pack_length\n"
        "assert type(found.config).__name__ == 'FinetuneConfig'\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_more_memory_never_gives_a_slower_plan_and_every_plan_fits(large: Path) -> None:
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import search

    config = FinetuneConfig.parse({"base_model": str(large), "adapter": {"type": "lora"}})
    found = [search(config, gigabytes * 1024 * MiB, "cuda", "speed").chosen for gigabytes in (160, 200, 400)]
    assert all(each.peak + each.process <= size * 1024 * MiB for each, size in zip(found, (160, 200, 400), strict=True))
    times = [each.operations for each in found]
    assert times == sorted(times, reverse=True)
    with pytest.raises(CompatibilityError, match=r"8,192 MiB(.|\n)*weights"):
        search(config, 8 * 1024 * MiB, "cuda")


def test_a_run_that_cannot_fit_is_refused_with_the_nearest_that_does(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from hyperion_core.testing.tiny import save_tiny_base

    from hyperion.config import FinetuneConfig
    from hyperion.optimization import refusal
    from hyperion.planning import make_plan

    save_tiny_base(tmp_path / "base")
    config = FinetuneConfig.parse(
        {"base_model": str(tmp_path / "base"), "dtype": "float32", "adapter": {"type": "lora"},
         "training": {"pack_length": 2048, "max_length": 64, "per_device_train_batch_size": 32}}
    )  # fmt: skip
    planned = make_plan(config, device="cpu")
    needed = sum(planned.plan.memory[part] for part in ("weights", "adapter", "gradients", "optimizer"))
    monkeypatch.setattr(refusal, "free_memory", lambda device: needed)
    refusal.refuse_what_cannot_fit(planned)
    monkeypatch.setattr(refusal, "free_memory", lambda device: needed - 1)
    with pytest.raises(CompatibilityError, match=r"weights(.|\n)*fix: ") as caught:
        refusal.refuse_what_cannot_fit(planned)
    assert caught.value.exit_code == 2
    unknown = replace(planned, plan=replace(planned.plan, memory={}))
    refusal.refuse_what_cannot_fit(unknown)


def test_the_command_marks_what_it_chose_and_prints_its_keys(large: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hyperion.cli.main import app

    config = tmp_path / "config.yaml"
    config.write_text(f"base_model: {large}\nadapter: {{type: lora}}\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["plan", str(config), "--memory", "400GiB", "--device", "cuda"])
    assert done.exit_code == 0, done.output
    assert "→" in done.output and "pack_length:" in done.output


def test_arguments_are_all_checked_at_once() -> None:
    from hyperion.optimization import AdapterOptimizer

    with pytest.raises(ConfigError) as caught:
        AdapterOptimizer("some/model", -1, "fast")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("800MiB", 800 * 2**20), ("1.5 gib", 3 * 2**29)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    from hyperion.cli.plan import size_in_bytes

    assert size_in_bytes(text) == size


def test_no_more_layers_are_computed_again_than_the_memory_asks_for(large: Path) -> None:
    """Of the slowest and smallest way between none and all: one layer less would not fit."""
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import candidates

    config = FinetuneConfig.parse({"base_model": str(large), "adapter": {"type": "lora"}})
    memory, process = 200 * 1024 * MiB, 600 * MiB
    some = [each for each in candidates(config, "cuda", memory, process) if 0 < each.step.checkpointed < 80]
    assert some
    for each in some:
        assert each.fits(memory) and each.lines()["training"]["recompute_layers"] == each.step.checkpointed
        less = {**each.config.training.given(), "recompute_layers": each.step.checkpointed - 1}
        smaller = each.config.replace(training=less)
        rivals = candidates(smaller, "cuda", memory, process)
        assert not any(
            rival.fits(memory)
            for rival in rivals
            if (rival.bits, rival.method, rival.rank, rival.step.tokens)
            == (each.bits, each.method, each.rank, each.step.tokens)
            and rival.step.checkpointed < each.step.checkpointed
        )


def test_auto_computes_as_few_layers_again_as_the_free_memory_asks_for(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from hyperion_core.testing.tiny import save_tiny_base

    from hyperion.config import FinetuneConfig
    from hyperion.optimization import recomputing_choice
    from hyperion.planning import make_plan

    save_tiny_base(tmp_path / "base", num_hidden_layers=12)

    def planned(asked: Any) -> Any:
        return make_plan(
            FinetuneConfig.parse(
                {"base_model": str(tmp_path / "base"), "dtype": "float32", "adapter": {"type": "lora"},
                 "training": {"max_length": 64, "recompute_layers": asked}}
            ),
            device="cpu",
        )  # fmt: skip

    needs = [sum(planned(count).plan.memory.values()) for count in range(13)]
    assert needs[0] > needs[9] > needs[10]
    assert needs[1] > needs[0]  # to compute again what one layer keeps takes more than it saves
    monkeypatch.setitem(recomputing_choice.PROCESS, "cpu", 0)
    for free, count in ((needs[0], 0), (needs[10], 10), (1, 12)):
        monkeypatch.setattr(recomputing_choice, "free_memory", lambda device, free=free: int(free / 0.9) + 1)
        found = planned("auto")
        assert found.config.training.recompute_layers == count
        assert f"{count} of 12" in found.plan.settings["recompute_layers"]
    monkeypatch.setattr(recomputing_choice, "free_memory", lambda device: None)
    assert planned("auto").config.training.checkpoints_activations()
