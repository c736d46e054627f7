"""Bits by module from measurement to file and back, and what a quantizer then really holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.context import RunContext
from hyperion_core.errors import CompatibilityError, ConfigError, DataError, HyperionError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.hooks import RunHooks
from hyperion_core.plan import Plan
from rich.console import Console

from hyperion.models.facts import model_facts
from hyperion.models.load import load_model
from hyperion.models.source import resolve_source
from hyperion.plugin_templates.quantizer.plugin import ChangemeConfig, ChangemeQuantizer
from hyperion.quantization import adaptive
from hyperion.quantization.bit_plan_file import read_bit_plan, write_bit_plan
from hyperion.quantization.bit_plan_table import bit_plan_table
from hyperion.quantization.heat_map import draw_heat_map
from hyperion.quantization.sensitivity import Sensitivity

TEXT = b"a text that no file of the plan may hold, for it is somebody's own data"


@pytest.fixture
def base(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture
def facts(base: Path) -> ModelFacts:
    return model_facts(resolve_source(str(base)))


def bits_for(base: Path, cache: Path, rows: Any = ..., **options: Any) -> Path:
    config = ChangemeConfig(**{"bits": "auto", "group_size": 16, **options})
    plugin, hooks = ChangemeQuantizer(), RunHooks()
    hooks.add(plugin, "changeme")
    if rows is ...:
        ids = torch.tensor([list(TEXT)])
        rows = [{"input_ids": ids[:, start:], "attention_mask": torch.ones_like(ids[:, start:])} for start in range(8)]
    plan = Plan(config={}, choices=(), device="cpu", dtype="float32")
    ctx = RunContext(plan=plan, seed=0, device="cpu", output=cache, cache=cache)
    return adaptive.adaptive_bits(base, config, hooks.quantizer("changeme"), plugin, ctx, rows)


def held(base: Path, plan: BitPlan, folder: Path) -> tuple[int, int]:
    """Bytes of a model that is quantized so: in memory, and on disk."""
    quantizer = ChangemeQuantizer()
    model = load_model(base, dtype="float32", device="cpu")
    model = quantizer.quantizer_after_load(model, ChangemeConfig(group_size=16), plan, False)
    quantizer.quantizer_save(model, ChangemeConfig(group_size=16), folder)
    memory = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return memory, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("target", [2.5, 3.0, 3.5, 4.0])
def test_what_the_quantizer_then_holds_keeps_the_budget(
    base: Path, facts: ModelFacts, tmp_path: Path, target: float
) -> None:
    path = bits_for(base, tmp_path / "cache", target_bits=target)
    plan = read_bit_plan(path, facts)
    uniform = []
    for bits in sorted({int(target), int(target + 0.5)}):
        (tmp_path / str(bits)).mkdir()
        uniform.append(held(base, BitPlan(bits, 16), tmp_path / str(bits)))
    (tmp_path / "adaptive").mkdir()
    memory, disk = held(base, plan, tmp_path / "adaptive")
    assert memory <= sum(each[0] for each in uniform) / len(uniform), "no more than so many bits everywhere"
    assert disk <= sum(each[1] for each in uniform) / len(uniform) + 4096, (
        "but for the header, which names more tensors"
    )
    assert memory > 0.9 * sum(each[0] for each in uniform) / len(uniform), "and it is made use of"
    written = json.loads(path.read_text(encoding="utf-8"))["bytes"]
    assert written["linear"] <= written["linear_budget"]
    # rotary embeddings are no weights
    assert written["model"] == pytest.approx(memory, rel=0.01)
    assert len({plan.of(module.name)[0] for module in facts.linear()}) > 1


def test_one_group_size_is_settled_for_all_where_none_is_said(base: Path, facts: ModelFacts, tmp_path: Path) -> None:
    """And written down: else bytes would depend on what else is quantized, and another version could choose another."""
    said = json.loads(bits_for(base, tmp_path, target_bits=3.0, group_size=None).read_text(encoding="utf-8"))
    size = said["group_size"]
    assert size >= 16 and not any(module.shape[1] % size for module in facts.linear())
    assert any(module.shape[1] % (2 * size) for module in facts.linear()), "the largest that divides all"


def test_a_budget_of_megabytes_is_for_the_whole_model(base: Path, facts: ModelFacts, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    plan = read_bit_plan(bits_for(base, tmp_path / "cache", budget_mb=0.1), facts)
    memory, disk = held(base, plan, tmp_path / "saved")
    assert 0.09e6 < memory <= 0.1e6 and disk <= 0.1e6 + 8192


def test_it_is_measured_once_and_another_budget_is_shared_out_of_the_same_figures(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bits_for(base, tmp_path, target_bits=3.0)
    before = first.read_bytes()
    monkeypatch.setattr(adaptive, "measure_sensitivity", lambda *args, **named: pytest.fail("measured again"))
    assert bits_for(base, tmp_path, target_bits=3.0) == first and first.read_bytes() == before
    other = bits_for(base, tmp_path, target_bits=2.5)
    monkeypatch.undo()
    next(tmp_path.glob("bit-plans/*.json")).write_text('{"method"')
    assert bits_for(base, tmp_path, target_bits=3.5), "a damaged file is measured anew"
    assert other != first and json.loads(other.read_text())["sensitivity"] == json.loads(before)["sensitivity"]
    again = bits_for(base, tmp_path / "anew", target_bits=3.0)
    assert again.read_bytes() == before, "the same bytes wherever it is made"
    assert TEXT not in before and str(base).encode() not in before
    assert first.with_name("bit_plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in tmp_path.glob("bit-plans/*") if "partial" in path.name) == []


def test_without_data_or_without_a_way_to_round_it_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (None, []):
        with pytest.raises(DataError) as caught:
            bits_for(base, tmp_path, rows, target_bits=3.0)
        assert "quantization.calibration.dataset" in caught.value.fix
    monkeypatch.setattr(adaptive, "measure_sensitivity", lambda *args, **named: pytest.fail("measured for nothing"))
    with pytest.raises(CompatibilityError) as refused:
        bits_for(base, tmp_path, target_bits=1.0)
    assert "narrower" in refused.value.fix
    monkeypatch.delattr(ChangemeQuantizer, "quantizer_fake_quantize")
    with pytest.raises(CompatibilityError) as lacking:
        bits_for(base, tmp_path, target_bits=3.0)
    assert "quantizer_fake_quantize" in lacking.value.why


# --- the file ---


def plan_of(facts: ModelFacts) -> BitPlan:
    widths = (2, 3, 16, 4)
    return BitPlan(
        16,
        0,
        {
            module.name: (widths[index % 4], 0 if widths[index % 4] == 16 else 16)
            for index, module in enumerate(facts.linear())
        },
    )


def test_a_plan_comes_back_from_its_file_in_the_same_bytes(facts: ModelFacts, tmp_path: Path) -> None:
    plan, losses = plan_of(facts), {module.name: {2: 1 / 3, 16: 0.0} for module in facts.linear()}
    for name in ("a.json", "b.json"):
        found = Sensitivity(losses, 100)
        write_bit_plan(tmp_path / name, plan, facts=facts, method="x", sensitivity=found, nbytes={"linear": 1})
        plan = read_bit_plan(tmp_path / name, facts)
        assert plan == plan_of(facts)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    shuffled = json.loads((tmp_path / "a.json").read_text())
    shuffled["modules"] = dict(reversed(shuffled["modules"].items()))
    (tmp_path / "c.json").write_text(json.dumps(shuffled))
    assert repr(read_bit_plan(tmp_path / "c.json", None)) == repr(plan), (
        "what is cached by a plan does not see the order"
    )


def change(**changes: Any) -> Any:
    return lambda content: {**content, **changes}


def modules(**changes: Any) -> Any:
    return lambda content: {**content, "modules": {**content["modules"], **changes}}


def without_first(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "modules": dict(list(content["modules"].items())[1:])}


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda content: [content], '"modules"'),
        (change(modules=[]), '"modules"'),
        (change(version=2), "version 2"),
        (change(version=True), "version True"),
        (change(version=None), "version None"),
        (change(group_size=-1), '"group_size" is -1'),
        (change(group_size="64"), '"group_size"'),
        (change(model_type=3), '"model_type"'),
        (modules(a=0), "a: 0"),
        (modules(a=17), "a: 17"),
        (modules(a=3.5), "a: 3.5"),
        (modules(a=True), "a: True"),
        (change(model_type="qwen3"), '"qwen3"'),
        (modules(unheard_of=4), "no unheard_of"),
        (without_first, "says nothing of model.layers.0"),
    ],
)
def test_a_file_that_is_no_plan_of_this_model_is_refused(
    facts: ModelFacts, tmp_path: Path, spoil: Any, says: str
) -> None:
    path = tmp_path / "plan.json"
    write_bit_plan(path, plan_of(facts), facts=facts, method="x")
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(HyperionError) as caught:
        read_bit_plan(path, facts)
    assert says in str(caught.value) and "fix:" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"version": 1, "modules": ', b"[" * 100_000, None], ids=repr
)
def test_a_damaged_or_missing_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_bit_plan(path, None)
    assert str(path) in str(caught.value) and "bits: auto" in str(caught.value)


# --- what a person sees ---


def test_the_table_counts_modules_by_kind(facts: ModelFacts) -> None:
    console = Console(width=100)
    plan = BitPlan(4, 16, {"*.down_proj": (2, 16), "model.layers.0.*_proj": (8, 16)})
    sizes = {module.name: {2: 1_000_000, 4: 2_000_000, 16: 9_000_000} for module in facts.linear()}
    with console.capture() as captured:
        console.print(bit_plan_table(plan, facts, sizes))
    lines = {line.split()[0]: line.split()[1:] for line in captured.get().splitlines()}
    assert lines["down_proj"] == ["2", "·", "·", "2.00", "2.0"]
    assert lines["up_proj"] == ["·", "1", "1", "6.00", "11.0"], "8 bits save nothing there: it stays as it is"
    assert lines["all"][:3] == ["2", "6", "6"]
    assert len(lines) == 1 + 7 + 1


def test_the_heat_map_takes_any_names(tmp_path: Path) -> None:
    from matplotlib.image import imread

    many = {f"model.layers.{layer}.{kind}": 2 + layer % 3 for layer in range(90) for kind in ("a", "b")}
    for bits in (many, {"project_in": 16}, {"transformer.h.3.mlp.c_fc": 8, "project_out": 1}):
        picture = imread(draw_heat_map(bits, tmp_path / "map.png", "a title"))
        assert picture.std() > 0.05 and picture.shape[1] < 5000
    once = draw_heat_map(many, tmp_path / "map.png").read_bytes()
    assert draw_heat_map(many, tmp_path / "map.png").read_bytes() == once
