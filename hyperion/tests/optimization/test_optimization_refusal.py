"""A run that would not fit stops before its weights load, and says what would."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hyperion_core.errors import CompatibilityError

from hyperion.config import FinetuneConfig
from hyperion.optimization import recomputing_choice, refusal
from hyperion.optimization.candidate import Candidate, Forecaster
from hyperion.optimization.row_lengths import RowLengths, row_lengths
from hyperion.planning import Planned, make_plan

for _module in ("transformers", "datasets", "hyperion_adapters_lora", "hyperion_objective_sft"):
    pytest.importorskip(_module)

LAYERS = 8
FITS = re.compile(r"these keys fit, in [\d,]+ MiB: (\{.*\}); training\.memory_check: false")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    from hyperion_core.testing.tiny import save_tiny_base

    return save_tiny_base(tmp_path / "base", num_hidden_layers=LAYERS)


def config(base: Path, adapter: dict[str, Any] | None = None, **training: Any) -> FinetuneConfig:
    """Rows that may be far longer than those of `rows`."""
    return FinetuneConfig.parse(
        {"base_model": str(base), "dtype": "float32", "adapter": {"type": "lora", **(adapter or {})},
         "training": {"max_length": 512, "pack_length": 512, "per_device_train_batch_size": 4, "use_cpu": True,
                      "max_steps": 1, **training}}
    )  # fmt: skip


def rows(length: int = 40, count: int = 8, alike: int = 0) -> Any:
    from datasets import Dataset

    ids = [[5] * alike + [9 + number] * (length - alike) for number in range(count)]
    labels = [[-100] * (alike + 1) + each[alike + 1 :] for each in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [length] * count})


def forecast(planned: Planned, length: int = 40) -> Candidate:
    """Of a run whose rows have so many tokens, four of them in a step."""
    lengths = RowLengths(length, 4 * length)
    made = Forecaster(planned.asked, planned.source, planned.facts, "cpu", lengths=lengths)
    return made.candidate(planned.config.training.given())


def free(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (refusal, recomputing_choice):
        monkeypatch.setattr(module, "free_memory", lambda device: size)


def check(planned: Planned, base: Path, train: Any) -> Planned:
    return refusal.within_memory(planned, base, train, logging.getLogger("hyperion.test"))


def pasted(asked: FinetuneConfig, error: CompatibilityError) -> FinetuneConfig:
    """The config with the keys that the error says fit."""
    found = FITS.search(error.fix)
    assert found, error
    keys = yaml.safe_load(found[1])
    return asked.replace(**{**keys, "training": {**asked.training.given(), **keys["training"]}})


def test_what_is_always_held_is_refused_with_the_nearest_settings_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperion_core.testing.tiny import save_tiny_base

    base = save_tiny_base(tmp_path / "base", hidden_size=256)
    asked = config(base, {"r": 256}, max_length=16, pack_length=16)
    planned = make_plan(asked, device="cpu")
    needed = sum(planned.plan.memory[part] for part in ("weights", "adapter", "gradients", "optimizer"))
    free(needed, monkeypatch)
    refusal.refuse_what_cannot_fit(planned)
    free(needed - 1, monkeypatch)
    with pytest.raises(CompatibilityError, match=r"in MiB: weights \d") as caught:
        refusal.refuse_what_cannot_fit(planned)
    assert caught.value.exit_code == 2
    nearest = pasted(asked, caught.value)
    assert nearest.quantization is None and getattr(nearest.adapter, "r", 0) == 64  # of those that are tried
    refusal.refuse_what_cannot_fit(make_plan(nearest, device="cpu"))
    refusal.refuse_what_cannot_fit(make_plan(config(base, {"r": 256}, memory_check=False), device="cpu"))
    refusal.refuse_what_cannot_fit(replace(planned, plan=replace(planned.plan, memory={})))  # nothing is known of it
    free(1, monkeypatch)
    with pytest.raises(CompatibilityError, match="nothing that was tried fits"):
        refusal.refuse_what_cannot_fit(planned)


def test_the_rows_of_the_data_decide_and_the_forecasts_error_is_given(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(base, recompute_layers=0)
    planned = make_plan(asked, device="cpu")
    run = forecast(planned)
    least = int(run.peak / (1 + refusal.MARGIN))
    assert least < sum(planned.plan.memory.values()) / 1.5, "rows of max_length would have to take more"
    free(least + 1, monkeypatch)
    check(planned, base, rows())
    free(least - 1, monkeypatch)
    with pytest.raises(CompatibilityError, match=r"activations \d(.|\n)*longest row has 40 tokens") as caught:
        check(planned, base, rows())
    check(planned, base, rows(length=20))
    nearest = pasted(asked, caught.value)
    assert nearest.quantization is None and nearest.adapter == asked.adapter, "it learns something else"
    assert forecast(make_plan(nearest, device="cpu")).peak < least
    for said in (config(base, memory_check=False), config(base, recompute_layers=LAYERS, pack_length=64)):
        check(make_plan(said, device="cpu"), base, rows())
    free(None, monkeypatch)
    check(planned, base, rows())


@pytest.mark.parametrize("said", [{}, {"recompute_layers": "auto"}], ids=str)
def test_as_few_layers_compute_again_as_the_rows_of_the_data_ask_for(
    said: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = [forecast(make_plan(config(base, recompute_layers=n), device="cpu")).peak for n in range(LAYERS + 1)]
    assert peaks[-1] * 1.2 < peaks[0]
    for room in (peaks[0], peaks[5], min(peaks)):
        count = next(number for number, peak in enumerate(peaks) if peak <= room)
        free(int(room / recomputing_choice.SHARE) + 1, monkeypatch)
        planned = make_plan(config(base, **said), device="cpu")
        found = check(planned, base, rows())
        assert forecast(found).step.checkpointed == count
        assert forecast(found).peak <= room
        if count != forecast(planned).step.checkpointed:
            assert found.plan.settings["recompute_layers"] == f"auto: {count} of {LAYERS}"
            assert found.plan.config["training"]["recompute_layers"] == count
            assert found.plan.memory == forecast(found).memory
    free(int(peaks[-1] / (1 + refusal.MARGIN)) - 1, monkeypatch)
    with pytest.raises(CompatibilityError):
        check(make_plan(config(base, **said), device="cpu"), base, rows())


@pytest.mark.parametrize(
    "said",
    [{"recompute_layers": 0}, {"gradient_checkpointing": False}, {"memory_check": False}, {"packing": False}],
    ids=str,
)
def test_no_layer_computes_again_where_the_config_speaks_of_it_or_nothing_is_known(
    said: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "packing" in said:
        said = {**said, "pack_length": None}
    given = {key: value for key, value in {**config(base).training.given(), **said}.items() if value is not None}
    planned = make_plan(config(base).replace(training=given), device="cpu")
    free(int(forecast(planned).peak / 1.1), monkeypatch)  # within the forecast's error
    assert check(planned, base, rows()) is planned


@pytest.mark.parametrize(
    "said",
    [{"packing": False, "pack_length": None}, {"offload_activations": "disk"}, {"stream_weights": True}],
    ids=str,
)
def test_a_forecast_of_unknown_error_only_warns(
    said: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(base)
    given = {**asked.training.given(), **said}
    asked = asked.replace(training={key: value for key, value in given.items() if value is not None})
    free(1, monkeypatch)
    check(make_plan(asked, device="cpu"), base, rows())
    assert "was not measured for such a run" in caplog.text


def test_a_pack_is_no_larger_than_the_rows_of_a_step_and_what_they_share_counts_once() -> None:
    training = FinetuneConfig.parse(
        {"base_model": "some", "adapter": {"type": "lora"}, "training": {"per_device_train_batch_size": 4}}
    ).training
    assert row_lengths(rows(), training) == RowLengths(40, 160)
    assert row_lengths(rows(count=3), training) == RowLengths(40, 120)
    assert row_lengths(rows(alike=30), training) == RowLengths(40, 30 + 4 * 10)


def test_what_torch_keeps_of_an_earlier_run_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hyperion.models.hardware import free_memory

    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert free_memory("cuda") == 140


def test_nothing_is_loaded_and_nothing_is_left_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperion import Trainer, pipeline
    from hyperion.data import DatasetProcessor

    class Loaded(Exception):
        pass

    def load(*args: Any) -> None:
        raise Loaded

    monkeypatch.setattr(pipeline, "load_base", load)
    train, _ = DatasetProcessor([{"prompt": f"{n} and", "completion": " on" * 100} for n in range(8)]).prepare()
    planned = make_plan(config(base), device="cpu")
    always = sum(planned.plan.memory[part] for part in ("weights", "adapter", "gradients", "optimizer"))
    free(always + 1, monkeypatch)
    with pytest.raises(CompatibilityError, match="longest row has 30"):
        Trainer(config(base)).train(train, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Loaded):
        Trainer(config(base)).train(train, output_dir=tmp_path / "out", memory_check=False)


def test_what_became_of_the_plan_is_written_and_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperion import Trainer
    from hyperion.data import DatasetProcessor

    train, _ = DatasetProcessor([{"prompt": f"{n} and", "completion": " on" * 100} for n in range(8)]).prepare()
    seen = []

    def watched(*args: Any) -> RowLengths:
        seen.append(row_lengths(*args))
        return seen[-1]

    monkeypatch.setattr(refusal, "row_lengths", watched)
    done = Trainer(config(base)).train(train, output_dir=tmp_path / "whole")
    planned = make_plan(config(base), device="cpu")
    made = Forecaster(planned.asked, planned.source, planned.facts, "cpu", lengths=seen[0])
    peak = made.candidate(planned.config.training.given()).peak
    assert "recompute_layers" not in json.loads((done.folder / "plan.json").read_text())["settings"]
    counted = []

    def layers(self: Any, count: int | None) -> None:
        counted.append(count)
        self.count = count

    from hyperion.acceleration.recomputing import RecomputedLayers

    monkeypatch.setattr(RecomputedLayers, "__init__", layers)
    monkeypatch.setattr(refusal, "free_memory", lambda device: int(0.95 * peak / refusal.SHARE))
    again = Trainer(config(base)).train(train, output_dir=tmp_path / "again")
    plan = json.loads((again.folder / "plan.json").read_text())
    (count,) = counted
    assert count and plan["settings"]["recompute_layers"] == f"auto: {count} of {LAYERS}"
    same = "adapter_model.safetensors"
    assert (again.folder / same).read_bytes() == (done.folder / same).read_bytes()
