"""Bases that are quantized already, and what is measured before one is quantized, from the config to the reload."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.context import NoProgress
from hyperion_core.facts import BitPlan

from hyperion import FinetuneConfig, HyperionError, Trainer
from hyperion.data import DatasetProcessor
from hyperion.lock import gather
from hyperion.models import load_tuned
from hyperion.models.facts import model_facts
from hyperion.models.source import resolve_source
from hyperion.planning import make_plan
from hyperion.quantization.bit_plan_file import write_bit_plan

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]
# Quantizes offline, after a look at data: it writes down what it saw.
MEASURES = """
import json
from dataclasses import replace
from pathlib import Path
from acme_rtn import RtnConfig, RtnQuantizer

class MeasuresConfig(RtnConfig):
    method: str = "measures"

class Measures(RtnQuantizer):
    config_class = MeasuresConfig
    provides = replace(RtnQuantizer.provides, calibration=True, reads=frozenset())

    def quantizer_prepare(self, source, config, bits, calibration, folder, ctx):
        from transformers import AutoModelForCausalLM

        rows = [row["input_ids"].tolist() for row in calibration]
        assert all(row["attention_mask"].shape == row["input_ids"].shape for row in calibration)
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
        self.quantizer_save(self.quantizer_after_load(model, config, bits, False), config, folder)
        with Path(ctx.cache, "seen.jsonl").open("a") as file:
            file.write(json.dumps(rows) + "\\n")
        return folder
"""


@pytest.fixture(autouse=True)
def installed(fake_dist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's quantizer as "rtn", and one made of it that measures; a cache of the test's own."""
    source = files("hyperion") / "plugin_templates" / "quantizer" / "plugin.py"
    module = source.read_text(encoding="utf-8").replace("changeme", "rtn").replace("Changeme", "Rtn")
    fake_dist(
        "acme-rtn",
        {"hyperion.quantizers": {"rtn": "acme_rtn:RtnQuantizer", "measures": "acme_measures:Measures"}},
        {"acme_rtn": module, "acme_measures": MEASURES},
    )
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("HYPERION_CACHE", str(tmp_path / "cache"))


def config(base: Path, quantization: dict[str, Any] | None, **training: Any) -> FinetuneConfig:
    return FinetuneConfig(
        base_model=str(base),
        dtype="float32",
        adapter={"type": "lora", "r": 4, "target_modules": "all-linear"},
        quantization=quantization,
        training={"per_device_train_batch_size": 4, "use_cpu": True, "max_steps": 2, "eval_samples": 0, **training},
    )


def trained(config: FinetuneConfig, folder: Path, rows: Any = ROWS) -> Path:
    Trainer(config).train(DatasetProcessor(dataset=rows).prepare()[0], output_dir=folder)
    return folder


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny base in 2 bits, groups of 16, as the quantizer's own library saves it."""
    from acme_rtn import RtnConfig, RtnQuantizer
    from hyperion_core.facts import BitPlan
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_model, tmp_path / "quantized"))
    model, plugin = AutoModelForCausalLM.from_pretrained(folder), RtnQuantizer()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    options = RtnConfig(symmetric=True)
    plugin.quantizer_save(plugin.quantizer_after_load(model, options, BitPlan(2, 16), False), options, folder)
    return folder


# --- a base that is quantized already ---


def test_it_brings_its_method_and_options_along(checkpoint: Path, tmp_path: Path) -> None:
    asked = config(checkpoint, None)
    planned = make_plan(asked, device="cpu")
    assert dict(planned.plan.rows())["quantization"] == (
        "2 bits in groups of 16; rtn, because the base is quantized already, and it loads that"
    )
    assert planned.config.quantization is not None and planned.config.quantization.symmetric is True  # type: ignore[attr-defined]
    folder = trained(asked, tmp_path / "out")
    held = {type(module).__name__ for module in load_tuned(folder).model.modules()}
    assert "PackedLinear" in held


def test_what_the_config_says_too_must_agree(checkpoint: Path) -> None:
    make_plan(config(checkpoint, {"method": "rtn", "bits": 2, "group_size": 16}), device="cpu")
    with pytest.raises(HyperionError) as caught:
        make_plan(config(checkpoint, {"method": "rtn", "bits": 4}), device="cpu")
    assert "quantized already, otherwise than the config asks for" in str(caught.value)
    assert "bits: 2 in the checkpoint, 4 in the config" in str(caught.value)
    with pytest.raises(HyperionError, match="target_bits shares out bits that are fixed"):
        make_plan(config(checkpoint, {"method": "rtn", "bits": "auto", "target_bits": 3}), device="cpu")


def test_one_number_is_not_what_a_checkpoint_with_bits_by_module_has(checkpoint: Path) -> None:
    saved = json.loads((checkpoint / "config.json").read_text())
    modules = saved["quantization_config"]["modules"]
    modules[next(iter(modules))] = [8, 16]
    (checkpoint / "config.json").write_text(json.dumps(saved))
    assert (
        make_plan(config(checkpoint, {"method": "rtn"}), device="cpu")
        .plan.settings["quantization"]
        .startswith("bits by module: 13 of 2, 1 of 8")
    )
    with pytest.raises(HyperionError, match="bits: 2 and 8, by module, in the checkpoint, 2 in the config"):
        make_plan(config(checkpoint, {"method": "rtn", "bits": 2}), device="cpu")


def test_another_method_does_not_quantize_it_again(checkpoint: Path) -> None:
    with pytest.raises(HyperionError) as caught:
        make_plan(config(checkpoint, {"method": "measures"}), device="cpu")
    assert 'is quantized already, by "rtn", and measures cannot quantize it again' in str(caught.value)
    assert "it is loaded as it is, by" in str(caught.value)


def test_a_method_that_nobody_here_knows_is_refused(checkpoint: Path) -> None:
    saved = json.loads((checkpoint / "config.json").read_text())
    saved["quantization_config"]["quant_method"] = "quip"
    (checkpoint / "config.json").write_text(json.dumps(saved))
    with pytest.raises(HyperionError, match='is quantized already, by "quip", and no installed quantizer loads that'):
        make_plan(config(checkpoint, None), device="cpu")


# --- bits by module ---


def test_bits_that_are_shared_out_train_again_from_their_file_and_reload(tiny_model: Path, tmp_path: Path) -> None:
    """The file of one run in the config of another: the same base to the bit, and so the same adapter."""
    shared = {"method": "rtn", "group_size": 16, "bits": "auto", "target_bits": 3.5}
    first = trained(config(tiny_model, shared), tmp_path / "first")
    plan = json.loads((first / "bit_plan.json").read_text(encoding="utf-8"))
    assert len(set(plan["modules"].values())) > 1
    shutil.copy(first / "bit_plan.json", tmp_path / "plan.json")
    again = trained(config(tiny_model, {"method": "rtn", "bit_plan": str(tmp_path / "plan.json")}), tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (first / "adapter_model.safetensors").read_bytes()
    (tmp_path / "plan.json").unlink()
    for folder in (first, again):
        assert (folder / "bit_plan.png").read_bytes().startswith(b"\x89PNG")
        model = load_tuned(folder).model
        held = {n.removeprefix("base_model.model.").removesuffix(".base_layer"): m.bits  # type: ignore[attr-defined]
                for n, m in model.named_modules() if type(m).__name__ == "PackedLinear"}  # fmt: skip
        assert held == {name: bits for name, bits in plan["modules"].items() if bits != 16}


def test_bits_that_were_shared_out_for_another_method_are_taken_and_told(tiny_model: Path, tmp_path: Path) -> None:
    facts = model_facts(resolve_source(str(tiny_model)))
    checks = []
    for method in ("gptq", "rtn"):
        write_bit_plan(tmp_path / "plan.json", BitPlan(4, 16), facts=facts, method=method)
        asked = config(tiny_model, {"method": "rtn", "bit_plan": str(tmp_path / "plan.json")})
        checks.append([check for check in make_plan(asked, device="cpu").plan.checks if "plan.json" in check.what])
    assert [(check.state, "shared out for gptq" in check.detail) for check in checks[0]] == [("note", True)]
    assert not checks[1]


# --- what is measured ---


def seen(tmp_path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (tmp_path / "cache/seen.jsonl").read_text().splitlines()]


def test_it_measures_rows_of_the_training_data_once(tiny_model: Path, tmp_path: Path) -> None:
    """And again only for other rows; what was made once is found again without them."""
    measures = {"method": "measures", "group_size": 16, "calibration": {"rows": 20, "max_length": 9}}
    for name, calibration in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        options = {**measures, "calibration": {**measures["calibration"], **calibration}}  # type: ignore[dict-item]
        trained(config(tiny_model, options), tmp_path / name)
    first, other = seen(tmp_path)
    assert len(first) == 20 and {len(row[0]) for row in first} == {9} and first != other
    assert "PackedLinear" in {type(module).__name__ for module in load_tuned(tmp_path / "a").model.modules()}
    assert len(seen(tmp_path)) == 2

    shutil.rmtree(tmp_path / "cache/quantized")
    with pytest.raises(HyperionError, match="the quantized base of this adapter is no longer in the cache"):
        load_tuned(tmp_path / "a")


def test_it_measures_data_that_the_config_names(tiny_model: Path, tmp_path: Path) -> None:
    other = [{"text": f"row {n} of quite another kind of data " * 3} for n in range(8)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    named = {"method": "measures", "group_size": 16, "calibration": {"dataset": str(tmp_path / "other.jsonl")}}
    trained(config(tiny_model, named), tmp_path / "out")
    (rows,) = seen(tmp_path)
    assert len(rows) == 8 and min(len(row[0]) for row in rows) > 50


def test_other_data_to_measure_is_another_run(tiny_model: Path, tmp_path: Path) -> None:
    """Refused when it is resumed; and the lock knows the data, and a file of bits."""
    named = tmp_path / "other.jsonl"
    named.write_text("\n".join(json.dumps({"text": f"row {n} of some text " * 4}) for n in range(8)), encoding="utf-8")
    options = {"method": "measures", "group_size": 16, "calibration": {"dataset": str(named)}}
    asked = config(tiny_model, options, save_steps=1, save_total_limit=5)
    folder = trained(asked, tmp_path / "out")
    facts = gather(make_plan(asked, device="cpu"), {}, NoProgress())["data"]
    assert any(key.startswith("calibration") and "other.jsonl" in key for key in facts)

    shutil.rmtree(folder / "checkpoint-2")
    (folder / "hyperion.json").unlink()
    named.write_text(named.read_text(encoding="utf-8").replace("some", "another"), encoding="utf-8")
    with pytest.raises(HyperionError, match=r"the calibration data is not what the run in .* began with"):
        Trainer(asked).train(DatasetProcessor(dataset=ROWS).prepare()[0], output_dir=folder, resume=True)
    assert gather(make_plan(asked, device="cpu"), {}, NoProgress())["data"] != facts


def test_too_few_tokens_to_measure_are_refused_and_nothing_is_left(tiny_model: Path, tmp_path: Path) -> None:
    measures = {"method": "measures", "group_size": 16, "calibration": {"rows": 2, "max_length": 8}}
    with pytest.raises(HyperionError, match="the calibration data is too short: 16 tokens in 2 rows"):
        trained(config(tiny_model, measures), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache/seen.jsonl").exists()


@pytest.mark.parametrize(
    "full",
    [
        "OSError(28, 'No space left on device')",
        "RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)')",
    ],
)
def test_a_disk_that_is_full_is_told_and_nothing_half_made_is_left(
    full: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import acme_measures

    def save(self: Any, model: Any, config: Any, folder: Path) -> list[Path]:
        (folder / "model.safetensors").write_bytes(b"half")
        raise eval(full)

    monkeypatch.setattr(acme_measures.Measures, "quantizer_save", save)
    measures = {"method": "measures", "group_size": 16}
    with pytest.raises(HyperionError) as caught:
        trained(config(tiny_model, measures), tmp_path / "out")
    assert "the quantized model cannot be kept in" in str(caught.value) and "No space left" in str(caught.value)
    assert "HYPERION_CACHE" in str(caught.value)
    left = [path.name for path in (tmp_path / "cache/quantized").iterdir() if not path.name.endswith(".lock")]
    assert left == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "quantization, says",
    [
        ({"method": "rtn", "calibration": {"rows": 8}}, "nothing is measured in this run"),
        ({"method": "measures", "calibration": {"dataset": "nowhere.jsonl"}}, "quantization.calibration"),
        ({"method": "measures", "bits": "auto", "target_bits": 1.5}, "1.5 bits cannot be reached"),
        ({"method": "rtn", "bits": 5}, "rtn cannot hold weights in 5 bits"),
    ],
)
def test_what_cannot_be_is_refused_while_planning(tiny_model: Path, quantization: dict[str, Any], says: str) -> None:
    with pytest.raises(HyperionError) as caught:
        make_plan(config(tiny_model, quantization), device="cpu")
    assert says in str(caught.value)
