"""`hyperion quantize`: what it writes can be loaded and says what was lost; what it cannot do it refuses at once."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import HyperionError
from safetensors.torch import load_file
from typer.testing import CliRunner

from hyperion.inspection.report import inspect_model
from hyperion.models.load import load_model, load_tokenizer
from hyperion.quantizing import quantize

# As the template's, but it measures on data, and writes what reached it.
CALIBRATED = """
from acme_rtn import RtnConfig, RtnQuantizer
from hyperion_core.facts import Provides

class CalibratedConfig(RtnConfig):
    method: str = "seeing"

class Calibrated(RtnQuantizer):
    config_class = CalibratedConfig
    provides = Provides(bits=frozenset({2, 4}), trainable=True, devices=frozenset({"cpu", "cuda"}), dequantize=True,
                        calibration=True, reads=frozenset({"rtn"}))

    def quantizer_prepare(self, source, calibration, ctx):
        if calibration is not None:
            (ctx.output / "seen.txt").write_text(str([row["input_ids"].shape[1] for row in calibration]))
        return None
"""
# A head that is no numbers, one that says nothing, and a plugin that loads nothing of what it wrote.
GARBAGE = """
from dataclasses import replace

from acme_rtn import RtnConfig, RtnQuantizer

class GarbageConfig(RtnConfig):
    method: str = "ruined"

class Garbage(RtnQuantizer):
    config_class = GarbageConfig

    def quantizer_save(self, model, config, folder):
        model.lm_head.weight.data.mul_(float("nan"))
        return super().quantizer_save(model, config, folder)

class SilentConfig(RtnConfig):
    method: str = "silent"

class Silent(RtnQuantizer):
    config_class = SilentConfig

    def quantizer_save(self, model, config, folder):
        model.lm_head.weight.data.zero_()
        return super().quantizer_save(model, config, folder)

class WriteOnlyConfig(RtnConfig):
    method: str = "write-only"

class WriteOnly(RtnQuantizer):
    config_class = WriteOnlyConfig
    provides = replace(RtnQuantizer.provides, reads=frozenset())
"""


@pytest.fixture(autouse=True)
def plugins(fake_dist: Any) -> None:
    source = files("hyperion") / "plugin_templates" / "quantizer" / "plugin.py"
    module = source.read_text(encoding="utf-8").replace("changeme", "rtn").replace("Changeme", "Rtn")
    names = {
        "rtn": "acme_rtn:RtnQuantizer",
        "seeing": "acme_c:Calibrated",
        "ruined": "acme_g:Garbage",
        "silent": "acme_g:Silent",
        "swapped": "acme_g:Swapped",
        "write-only": "acme_g:WriteOnly",
    }
    fake_dist("acme-rtn", {"hyperion.quantizers": names}, {"acme_rtn": module, "acme_c": CALIBRATED, "acme_g": GARBAGE})


def rows(folder: Path, count: int = 12) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} plus {n} is {n + n}, and so on"}) for n in range(count)))
    return path


def command(*arguments: object) -> Any:
    import typer

    from hyperion.cli.quantize import quantize as quantize_command

    app = typer.Typer()
    app.command()(quantize_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_checkpoint_is_loaded_by_its_library_and_its_figures_are_true(tiny_model: Path, tmp_path: Path) -> None:
    done = command(tiny_model, "--method", "rtn", "--bits", "4", "--group-size", "16", "--dtype", "float32",
                   "--set", "symmetric=true", "-o", tmp_path / "out", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["options"]["symmetric"] is True and said["options"]["group_size"] == 16

    before = load_model(tiny_model, dtype="float32", device="cpu")
    after = load_model(tmp_path / "out", dtype="float32", device="cpu")  # the plugin has taught transformers
    tokenizer = load_tokenizer(tmp_path / "out")
    ids = torch.tensor([tokenizer("The cat sat on the mat.")["input_ids"]])
    with torch.no_grad():
        apart = (before(input_ids=ids).logits - after(input_ids=ids).logits).abs().max()
    assert 0 < apart < 1
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert said["bytes_on_disk"]["after"] == weights < said["bytes_on_disk"]["before"]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["figures"] == said["parity"] and 0 < parity["figures"]["mean_kl"] < 0.1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "tokenizer.json", "generation_config.json", "quantized.json"} <= names
    card = (tmp_path / "out/README.md").read_text()
    assert "Do not load it with plain transformers" in card, "the format is one that a plugin made up"
    found = inspect_model(str(tmp_path / "out"))
    assert found.model is not None and found.model.quantization is not None
    assert found.model.quantization.reader == "rtn" and found.model.mean_bits == 4.0
    assert found.versions["acme-rtn"] == "1.0"


def test_stopped_it_says_that_nothing_was_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperion.models.load.load_model", stopped)
    done = command(tiny_model, "--method", "rtn", "--bits", "4", "--group-size", "16", "-o", tmp_path / "out")
    assert done.exit_code == 130 and "interrupted; nothing was written" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "rtn", "bits": 5, "group_size": 13}, ["bits: rtn cannot hold weights in 5 bits", "group_size: "]),
        ({"method": "rtn", "bits": "auto"}, ["bits: auto has no budget"]),
        ({"method": "rtn", "bits": "auto", "target_bits": 3.5, "group_size": 16}, ["no data to measure on"]),
        ({"method": "seeing"}, ["there is no data to measure on", "--calibration"]),
        ({"method": "seeing", "bits": "auto", "target_bits": 4.0}, ['"seeing" has no bits by module']),
        ({"method": "rtn", "bits": "auto", "budget_mb": 0.02, "group_size": 16},
         ["the model cannot be held in 0.02 MB", "embeddings and norms, which stay"]),
        ({"method": "rtn", "symetric": True}, ['did you mean "symmetric"']),
        ({"method": "rtx"}, ['did you mean "rtn"']),
        ({"method": "rtn", "group_size": 16, "calibration": {"dataset": "no.jsonl"}}, ["nothing is measured"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    options: dict[str, Any], expected: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*arguments: Any, **named: Any) -> None:
        raise AssertionError("it loads the model")

    monkeypatch.setattr("hyperion.models.load.load_model", loads)
    with pytest.raises(HyperionError) as caught:
        quantize(str(tiny_model), options, output_dir=tmp_path / "out")
    assert all(text in str(caught.value) for text in expected), str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again_and_a_full_folder_stays(tiny_model: Path, tmp_path: Path) -> None:
    options = {"method": "rtn", "group_size": 16}
    quantize(str(tiny_model), options, output_dir=tmp_path / "once")
    with pytest.raises(HyperionError, match='is quantized already, by "rtn"'):
        quantize(str(tmp_path / "once"), options, output_dir=tmp_path / "twice")
    before = sorted((tmp_path / "once").iterdir())
    with pytest.raises(HyperionError, match="is not empty"):
        quantize(str(tiny_model), options, output_dir=tmp_path / "once")
    assert sorted((tmp_path / "once").iterdir()) == before and not (tmp_path / "twice").exists()


def test_named_data_reaches_the_quantizer(tiny_model: Path, tmp_path: Path) -> None:
    options = {"method": "seeing", "group_size": 16, "calibration": {"dataset": str(rows(tmp_path)), "rows": 5}}
    quantize(str(tiny_model), options, output_dir=tmp_path / "out")
    assert len(json.loads((tmp_path / "out/seen.txt").read_text())) == 5
    rows(tmp_path, count=1)
    with pytest.raises(HyperionError, match="the calibration data is too short"):
        quantize(str(tiny_model), options, output_dir=tmp_path / "short")


def test_bits_by_module_are_written_with_their_picture_and_applied_again(tiny_model: Path, tmp_path: Path) -> None:
    options = {"method": "rtn", "bits": "auto", "target_bits": 4.0, "group_size": 16,
               "calibration": {"dataset": str(rows(tmp_path))}}  # fmt: skip
    quantize(str(tiny_model), options, output_dir=tmp_path / "auto")
    plan = tmp_path / "auto/bit_plan.json"
    found = inspect_model(str(tmp_path / "auto"))
    assert plan.is_file() and (tmp_path / "auto/bit_plan.png").is_file()
    assert found.bit_plan is not None and len(found.bit_plan) > 1
    again = {"method": "rtn", "bit_plan": str(plan)}
    quantize(str(tiny_model), again, output_dir=tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "again/bit_plan.png").is_file()


@pytest.mark.parametrize(
    ("method", "limits", "expected"),
    [("ruined", {}, "not finite"), ("rtn", {"max_kl": 1e-9}, "nats a token"), ("rtn", {"min_top1": 1.0}, "likeliest")],
)
def test_what_answers_otherwise_than_it_may_is_not_left_behind(
    method: str, limits: dict[str, float], expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    options = {"method": method, "bits": 2, "group_size": 16}
    with pytest.raises(HyperionError) as caught:
        quantize(str(tiny_model), options, output_dir=tmp_path / "out", **limits)
    assert expected in str(caught.value)
    assert not list(tmp_path.glob("*out*")), "nothing half-written is left"


def test_damage_is_told_from_what_so_many_bits_usually_lose(tiny_model: Path, tmp_path: Path) -> None:
    """It is as near as guessing, and far from what 8 bits do."""
    with pytest.raises(HyperionError, match="does not answer as the model that it was made of"):
        quantize(str(tiny_model), {"method": "silent", "bits": 8, "group_size": 16}, output_dir=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_method_that_loads_none_of_its_checkpoints_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperion.quantizing._before", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(HyperionError, match='"write-only" cannot make a checkpoint that stands alone'):
        quantize(str(tiny_model), {"method": "write-only", "bits": 4}, output_dir=tmp_path / "out")


def test_a_full_disk_is_told_as_such(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(HyperionError) as caught:
        quantize(str(tiny_model), {"method": "rtn", "group_size": 16}, output_dir=tmp_path / "out")
    assert "No space left on device" in str(caught.value) and not list(tmp_path.glob("*out*"))
