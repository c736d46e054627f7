"""`load_standalone`: what merge and quantize write, loaded to answer."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import CompatibilityError
from hyperion_core.registry import registry

from hyperion.models import load_standalone
from hyperion.models.load import load_model
from hyperion.quantizing import quantize


@pytest.fixture(autouse=True)
def plugins(fake_dist: Any) -> None:
    source = files("hyperion") / "plugin_templates" / "quantizer" / "plugin.py"
    module = source.read_text(encoding="utf-8").replace("changeme", "rtn").replace("Changeme", "Rtn")
    fake_dist("acme-rtn", {"hyperion.quantizers": {"rtn": "acme_rtn:RtnQuantizer"}}, {"acme_rtn": module})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def test_a_plain_model_answers_as_it_is(tiny_model: Path) -> None:
    model, tokenizer = load_standalone(tiny_model, dtype="float32")
    assert torch.equal(logits(model), logits(load_model(tiny_model, dtype="float32", device="cpu").eval()))
    assert not model.training and not any(each.requires_grad for each in model.parameters())
    assert tokenizer.decode(tokenizer("a cat")["input_ids"], skip_special_tokens=True) == "a cat"


def test_a_quantized_one_is_loaded_by_the_plugin_that_reads_it(tiny_model: Path, tmp_path: Path) -> None:
    """Its bits are those of the folder, not those that the method would take by itself."""
    options = {"method": "rtn", "bits": 8, "group_size": 16}
    quantize(str(tiny_model), options, output_dir=tmp_path / "out", dtype="float32")
    model, _ = load_standalone(tmp_path / "out", dtype="float32")
    before = logits(load_model(tiny_model, dtype="float32", device="cpu").eval())
    assert 0 < (logits(model) - before).abs().max() < 0.05
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert not any(each.requires_grad for each in model.parameters())


def _saying(dtype: str | None) -> Any:
    def quantizer_inference_dtype(self: Any, device: str) -> str | None:
        return dtype

    return quantizer_inference_dtype


def test_left_to_itself_it_answers_in_the_type_that_the_quantizer_is_fast_in(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(
        str(tiny_model), {"method": "rtn", "bits": 8, "group_size": 16}, output_dir=tmp_path / "out", dtype="float32"
    )
    plugin = registry().load("quantizer", "rtn")
    monkeypatch.setattr("hyperion.models.hardware._cpu_has_bf16", lambda: False)
    for said, dtype, expected in (
        ("bfloat16", "auto", torch.bfloat16), (None, "auto", torch.float32), ("bfloat16", "float32", torch.float32),
    ):  # fmt: skip
        monkeypatch.setattr(plugin, "quantizer_inference_dtype", _saying(said), raising=False)
        assert load_standalone(tmp_path / "out", dtype=dtype).model.dtype == expected


def test_a_format_that_nothing_here_loads_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(CompatibilityError, match='by "quip"'):
        load_standalone(folder)


def answer(model: Any, new: int) -> torch.Tensor:
    ids = torch.arange(3, 9)[None]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=-1
    )


@pytest.mark.slow
def test_compiled_it_says_the_same(tiny_model: Path) -> None:
    """Compiled once; for a longer answer once more, and then for any."""
    plain, _ = load_standalone(tiny_model, dtype="float32")
    model, _ = load_standalone(tiny_model, dtype="float32", compiled=True)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    for new, graphs in ((6, 1), (5, 1), (9, 2), (17, 2)):
        assert torch.equal(answer(model, new), answer(plain, new))
        assert counted["unique_graphs"] == graphs


def test_what_cannot_be_compiled_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(
        str(tiny_model), {"method": "rtn", "bits": 8, "group_size": 16}, output_dir=tmp_path / "out", dtype="float32"
    )
    with pytest.raises(CompatibilityError, match="quantized like this cannot be compiled"):
        load_standalone(tmp_path / "out", compiled=True)
    monkeypatch.setenv("CXX", "none-such")
    with pytest.raises(CompatibilityError, match="no C\\+\\+ compiler"):
        load_standalone(tiny_model, compiled=True)
