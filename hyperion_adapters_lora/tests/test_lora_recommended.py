"""`quality: auto` on LoRA: it fills what is left open, never overrides, and fits what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import ConfigError
from hyperion_core.facts import ModelFacts, ModuleFact
from hyperion_core.testing.tiny import save_tiny_base

from hyperion import FinetuneConfig
from hyperion.models.facts import model_facts
from hyperion.models.source import resolve_source
from hyperion.planning import Planned, Rows, make_plan
from hyperion_adapters_lora import LoraAdapter, LoraConfig, recommended

TABLE = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "loraplus_lr_ratio": 4.0,
}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests hold whatever the benchmark's winner is."""
    monkeypatch.setattr(recommended, "OPTIONS", TABLE)
    monkeypatch.setattr(recommended, "TRAINING", {"learning_rate": 7e-4, "optim": "muon", "warmup_ratio": 0.05})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def planned(base: Path, adapter: Any, quality: str | None = "auto", **training: Any) -> Planned:
    config = FinetuneConfig(base_model=str(base), adapter=adapter, training=training, quality=quality)
    return make_plan(config, rows=Rows(10, 0), device="cpu")


def test_what_is_left_out_is_filled_and_shown(base: Path) -> None:
    found = planned(base, "lora")
    assert found.config.adapter.given() == {"type": "lora", **TABLE}
    assert (found.config.training.learning_rate, found.config.training.warmup_ratio) == (7e-4, 0.05)
    shown = dict(found.plan.rows())["quality"]
    assert "loraplus_lr_ratio: 4" in shown and "learning_rate: 0.0007" in shown and "optim: muon" in shown
    assert recommended.BASIS in shown
    assert found.plan.config["adapter"]["r"] == 4  # a run can be made again from its plan, whatever the table says then
    again = FinetuneConfig.parse(found.plan.config)
    assert make_plan(again, rows=Rows(10, 0), device="cpu").plan.config == found.plan.config
    plain = planned(base, "lora", quality=None)
    assert plain.config.adapter.given() == {"type": "lora"} and "quality" not in plain.plan.settings


def test_what_is_said_stands(base: Path) -> None:
    said = {"type": "lora", "r": 2, "target_modules": ["q_proj"], "loraplus_lr_ratio": None}
    found = planned(base, said, learning_rate=1e-4, warmup_steps=1, optim="muon")
    assert found.config.adapter.given() == {
        **said,
        "lora_alpha": 4,
    }  # the table's scaling at this rank
    assert found.config.training.given() == {"learning_rate": 1e-4, "warmup_steps": 1, "optim": "muon"}
    assert "sets lora_alpha: 4 (" in found.plan.settings["quality"]
    everything = planned(base, {"type": "lora", **TABLE}, learning_rate=1e-4, warmup_ratio=0.0, optim="muon")
    assert "all that it would set is given" in everything.plan.settings["quality"]
    for other in ("sgd", "adamw_torch"):  # its rates are not Muon's
        assert planned(base, "lora", optim=other).config.training.given() == {"optim": other}


@pytest.mark.parametrize(
    "said, left_out",
    [
        ({"layers_to_transform": [0]}, {"target_modules"}),
        ({"rank_pattern": {"q_proj": 2}}, {"r", "lora_alpha"}),
        ({"init_lora_weights": "pissa"}, set()),
    ],
)
def test_it_fits_what_is_said(said: dict[str, Any], left_out: set[str], base: Path) -> None:
    found = planned(base, {"type": "lora", **said})
    assert TABLE.keys() - found.config.adapter.given().keys() == left_out - said.keys()


def test_modules_that_the_base_does_not_have_are_left_to_peft(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommended, "OPTIONS", {**TABLE, "target_modules": ["c_attn"]})
    assert planned(base, "lora").config.adapter.target_modules is None


def test_a_rank_and_a_rule_keep_the_scaling(base: Path) -> None:
    assert planned(base, {"type": "lora", "r": 16, "use_rslora": True}).config.adapter.lora_alpha == 8
    assert planned(base, {"type": "lora", "use_rslora": True}).config.adapter.lora_alpha == 4


@pytest.mark.parametrize(("width", "rate"), [(32, 7e-4), (576, 7e-4), (2304, 3.5e-4), (4096, 2.6e-4)])
def test_wider_models_learn_at_a_lower_rate(width: int, rate: float) -> None:
    model = ModelFacts("x", "llama", (ModuleFact("lm_head", "linear", (10, width)),), hidden_size=width)
    assert LoraAdapter().adapter_recommend(LoraConfig(), model, None).training["learning_rate"] == rate


def test_the_table_itself_is_in_order(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.undo()
    found = LoraAdapter().adapter_recommend(LoraConfig(), ModelFacts("x", why_unknown="not local"), None)
    assert found.options == recommended.OPTIONS and found.training
    FinetuneConfig(base_model="x", adapter={"type": "lora", **found.options}, training=found.training)
    fitting = LoraAdapter().adapter_recommend(LoraConfig(), model_facts(resolve_source(str(base))), None)
    assert not LoraAdapter().adapter_check(LoraConfig(**fitting.options), model_facts(resolve_source(str(base))), None)


def test_an_adapter_without_recommendations_says_so(base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(base, "ia3")
    assert "quality: quality: auto does nothing" in str(caught.value)
    assert 'the adapter "ia3" recommends no settings' in str(caught.value)
