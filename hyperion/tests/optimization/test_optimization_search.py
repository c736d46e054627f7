"""Settings that fit, from a config.json alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Llama of two layers, wide enough that quantizing it saves memory, of which there is a config.json only."""
    folder = tmp_path / "small"
    folder.mkdir()
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16}
    (folder / "config.json").write_text(json.dumps({**LLAMA_70B, **shape, "vocab_size": 512}), encoding="utf-8")
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


@pytest.mark.slow
def test_more_memory_never_gives_a_slower_plan_and_every_plan_fits(large: Path) -> None:
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import search

    config = FinetuneConfig.parse({"base_model": str(large), "adapter": {"type": "lora"}})
    found = [search(config, gigabytes * 1024 * MiB, "cuda", "speed").chosen for gigabytes in (160, 200, 400)]
    assert all(each.peak + each.process <= size * 1024 * MiB for each, size in zip(found, (160, 200, 400), strict=True))
    times = [each.operations for each in found]
    assert times == sorted(times, reverse=True)
    with pytest.raises(CompatibilityError, match=r"2,048 MiB(.|\n)*weights"):
        search(config, 2 * 1024 * MiB, "cuda")


@pytest.mark.parametrize("target", ["speed", "balanced", "quality"])
def test_the_command_prints_the_best_of_each_way_that_fits_in_order(target: str, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("hyperion_quant_bnb")
    from typer.testing import CliRunner

    from hyperion.cli.main import app
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.memory_model import PROCESS
    from hyperion.optimization.search import candidates

    config = tmp_path / "config.yaml"
    config.write_text(f"base_model: {small}\nadapter: {{type: lora}}\n", encoding="utf-8")
    every = candidates(FinetuneConfig.from_file(config), "cuda", 2**40, PROCESS["cuda"])
    ways = {(each.method, each.bits) for each in every}
    assert len(ways) > 1, "there is no quantizer to choose from"
    # room for all but the largest way to hold the base
    least = sorted(min(each.peak for each in every if (each.method, each.bits) == way) for way in ways)
    memory = PROCESS["cuda"] + least[-1] - 1
    every = candidates(FinetuneConfig.from_file(config), "cuda", memory, PROCESS["cuda"])
    done = CliRunner().invoke(
        app, ["plan", str(config), "--memory", f"{memory}B", "--device", "cuda", "--target", target]
    )
    assert done.exit_code == 0, done.output
    table, _, keys = done.output.partition("For the config:")
    rows = re.findall(r"^(→?) *(?:(not quantized)|(\w+), (\d+) bits) +(\d+) +(\d+) +(\d+) ", table, re.MULTILINE)
    printed = [
        ("", 16, *map(int, numbers)) if plain else (method, int(bits), *map(int, numbers))
        for _, plain, method, bits, *numbers in rows
    ]

    def better(each: Any) -> tuple[float, ...]:
        rank, fast = each.rank, each.operations
        return {
            "speed": (fast, -each.bits, -rank), "quality": (-each.bits, -rank, fast),
            "balanced": (rank < 16, fast, -each.bits, -rank),
        }[target]  # fmt: skip

    fitting = [each for each in every if each.fits(memory)]
    best = [
        min((each for each in fitting if (each.method, each.bits) == way), key=lambda each: (*better(each), each.peak))
        for way in {(each.method, each.bits) for each in fitting}
    ]
    expected = [
        (each.method, each.bits, each.rank, each.step.tokens, each.step.checkpointed)
        for each in sorted(best, key=lambda each: (*better(each), each.peak))
    ]
    assert len(expected) == len(ways) - 1 and printed == expected
    assert [row[0] for row in rows] == ["→", *[""] * (len(rows) - 1)]
    assert f"r: {expected[0][2]}\n" in keys and "pack_length:" in keys


def test_arguments_are_all_checked_at_once() -> None:
    from hyperion.optimization import AdapterOptimizer

    with pytest.raises(ConfigError) as caught:
        AdapterOptimizer("some/model", -1, "fast")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("800MiB", 800 * 2**20), ("1.5 gib", 3 * 2**29)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    from hyperion.cli.plan import size_in_bytes

    assert size_in_bytes(text) == size


@pytest.mark.slow
def test_no_more_layers_are_computed_again_than_the_memory_asks_for(large: Path) -> None:
    """Of the slowest and smallest way between none and all: one layer less would not fit."""
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import candidates

    config = FinetuneConfig.parse({"base_model": str(large), "adapter": {"type": "lora"}})
    memory, process = 200 * 1024 * MiB, 600 * MiB
    some = [each for each in candidates(config, "cuda", memory, process) if 0 < each.step.checkpointed < 80]
    assert some
    for each in some:
        assert each.fits(memory) and each.lines(config)["training"]["recompute_layers"] == each.step.checkpointed
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


@pytest.mark.parametrize("options", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_auto_takes_options_of_checkpointing(options: str, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("transformers")
    from hyperion_core.testing.tiny import save_tiny_base

    from hyperion.config import FinetuneConfig
    from hyperion.optimization import recomputing_choice
    from hyperion.planning import make_plan

    training = {"recompute_layers": "auto", options: {"use_reentrant": False}}
    data = {"base_model": str(save_tiny_base(tmp_path / "base")), "adapter": {"type": "lora"}, "training": training}
    for free, count, kept in ((2**40, 0, None), (1, 2, {"use_reentrant": False})):
        monkeypatch.setattr(recomputing_choice, "free_memory", lambda device, free=free: free)
        said = make_plan(FinetuneConfig.parse(data), device="cpu").config.training
        assert (said.recompute_layers, getattr(said, options)) == (count, kept)


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    "asked",
    [
        {"quality": "auto"},
        {"training": {"packing": False}},
        {"training": {"neftune_noise_alpha": 5.0, "pack_length": 300}},
        {"training": CHECKPOINTED},
        {"training": {**CHECKPOINTED, "gradient_checkpointing": None, "recompute_layers": "auto"}},
        {"training": {"stream_weights": True}},
        {"quantization": {"bits": "auto", "target_bits": 3}},
        {"quantization": {"method": "torchao", "bits": 4}},
    ],
    ids=str,
)
def test_a_run_of_the_keys_that_are_printed_is_planned_the_same(asked: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from hyperion_core.testing.tiny import save_tiny_base

    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import candidates
    from hyperion.planning import make_plan

    if "quantization" in asked:
        pytest.importorskip("hyperion_quant_gptq")
    base = save_tiny_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    training = {"max_length": 64, "gradient_accumulation_steps": 2, **asked.get("training", {})}
    training = {key: said for key, said in training.items() if said is not None}
    data = {"base_model": str(base), "dtype": "float32", "adapter": {"type": "lora"}, **asked, "training": training}
    config = FinetuneConfig.parse(data)
    found = candidates(config, "cpu", 2**20, 0)
    passes = {each.step.tokens for each in found}
    assert len(passes) > 1 and {0, 2} <= {each.step.checkpointed for each in found}
    for each in found[:: max(1, len(found) // 12)]:  # a plan takes its time
        lines = each.lines(config)
        switches = {"gradient_checkpointing", "activation_checkpointing", "recompute_layers"}
        if not each.step.checkpointed:
            switches.add("gradient_checkpointing_kwargs")
        kept = {key: said for key, said in training.items() if key not in switches}
        pasted = {**data, **lines, "training": {**kept, **lines["training"]}}
        planned = make_plan(FinetuneConfig.parse(pasted), device="cpu")
        assert planned.plan.memory == each.memory
        rows = planned.config.training.per_device_train_batch_size
        assert rows * planned.config.training.gradient_accumulation_steps == 16


def test_of_a_base_that_is_quantized_there_is_one_way_to_hold_it(small: Path) -> None:
    pytest.importorskip("hyperion_quant_bnb")
    from hyperion.config import FinetuneConfig
    from hyperion.optimization import AdapterOptimizer
    from hyperion.optimization.search import search

    saved = json.loads((small / "config.json").read_text(encoding="utf-8"))
    saved["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (small / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    found = search(FinetuneConfig.parse({"base_model": str(small), "adapter": {"type": "lora"}}), 2**40, "cuda")
    assert [(each.method, each.bits) for each in found.alternatives] == [("bnb", 4)]
    assert AdapterOptimizer(str(small), 2**20).generate_config().quantization.bits == 4
    other = {"base_model": str(small), "adapter": {"type": "lora"}, "quantization": {"method": "bnb", "bits": 8}}
    alternatives = search(FinetuneConfig.parse(other), 2**40, "cuda").alternatives
    assert [(each.method, each.bits) for each in alternatives] == [("bnb", 4)]


def test_what_a_run_refuses_is_refused_with_the_same_reason(small: Path) -> None:
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import search

    asked = {"base_model": str(small), "adapter": {"type": "lora"}, "training": {"stream_weights": True}}
    with pytest.raises(ConfigError, match="stream_weights does not work on mps"):
        search(FinetuneConfig.parse(asked), 2**40, "mps")


@pytest.mark.parametrize("roots", [False, True])
def test_what_an_adapter_of_another_rank_learns_weighs_as_much(roots: bool, small: Path) -> None:
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import candidates

    adapter = {"type": "lora", "r": 16, "lora_alpha": 32, "use_rslora": roots}
    found = candidates(FinetuneConfig.parse({"base_model": str(small), "adapter": adapter}), "cuda", 1, 0)
    adapters = [each.config.adapter for each in found]
    assert {each.r for each in adapters} == {8, 16, 32, 64}  # type: ignore[attr-defined]
    scales = [each.lora_alpha / (each.r**0.5 if roots else each.r) for each in adapters]  # type: ignore[attr-defined]
    assert scales == pytest.approx([8.0 if roots else 2.0] * len(scales), rel=0.02)


@pytest.mark.parametrize(("stored", "streams"), [("bfloat16", True), ("float32", False), (None, True)])
def test_weights_are_streamed_only_in_the_type_that_they_are_stored_in(
    stored: str | None, streams: bool, small: Path
) -> None:
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.search import candidates

    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    (small / "config.json").write_text(json.dumps(config | ({"dtype": stored} if stored else {})), encoding="utf-8")
    asked = FinetuneConfig.parse(
        {"base_model": str(small), "adapter": {"type": "lora"}, "training": {"stream_weights": True}}
    )
    if streams:
        assert candidates(asked, "cuda", 1, 0)
    else:
        with pytest.raises(ConfigError, match="stored as float32, and the run computes in bfloat16"):
            candidates(asked, "cuda", 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_does_not_fit_otherwise_is_kept_elsewhere(device: str, small: Path) -> None:
    """And only then."""
    from hyperion.config import FinetuneConfig
    from hyperion.optimization.candidate import described
    from hyperion.optimization.search import _ELSEWHERE, candidates, search

    # of many layers: two of them are less than all in 4 bits
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 40, "num_attention_heads": 4}
    (small / "config.json").write_text(json.dumps({**LLAMA_70B, **shape, "vocab_size": 512}), encoding="utf-8")
    asked = {"base_model": str(small), "adapter": {"type": "lora"}, "training": {"max_length": 1024}}
    config = FinetuneConfig.parse(asked)
    memory = min(each.peak for each in candidates(config, device, 1, 0))
    plain = search(config, memory, device, process=0).chosen
    assert not plain.config.training.stream_weights and plain.config.training.offload_activations is None
    peaks = {}
    for moved in _ELSEWHERE[device]:
        other = FinetuneConfig.parse({**asked, "training": {**asked["training"], **moved}})
        peaks[str(moved)] = min(each.peak for each in candidates(other, device, 1, 0))
    found = search(config, min(peaks.values()), device, process=0).chosen
    assert found.peak < memory and "weights streamed" in described(found)
    lines = found.lines(config)["training"]
    pasted = FinetuneConfig.parse({**asked, **found.lines(config), "training": {**asked["training"], **lines}})
    assert pasted.training.stream_weights == found.config.training.stream_weights
    assert pasted.training.offload_activations == found.config.training.offload_activations
    with pytest.raises(CompatibilityError, match="in any of the settings"):
        search(config, min(peaks.values()) - MiB, device, process=0)
