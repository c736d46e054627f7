"""The gate in front of an export: what is honest passes, and each known fault of merging is caught, leaving nothing."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperion_core.errors import ArtifactError, CompatibilityError, HyperionError
from hyperion_core.testing.tiny import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from tuned_runs import LORA, RTN, base_model, tuned_run

from hyperion import exporting
from hyperion.exporting import export_merged
from hyperion.quantization import merged_module, merging
from hyperion_adapters_lora import LoraAdapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = {**LORA, "lora_alpha": 16}
    return tuned_run(tmp_path_factory.mktemp("plain") / "run", base, adapter=adapter).folder


@pytest.fixture
def quantized_run(rtn: None, base: Path, tmp_path: Path) -> Path:
    return tuned_run(tmp_path / "run", base, adapter={**LORA, "lora_alpha": 16}, quantization=RTN).folder


def refused(run: Path, folder: Path, into: Any, error: type[HyperionError] = ArtifactError) -> str:
    """What the export says; nothing is left of it."""
    folder.mkdir()
    with pytest.raises(error) as caught:
        export_merged(run, folder / "below" / "merged", into=into)
    assert caught.value.exit_code == 2 and caught.value.fix
    assert not list(folder.iterdir()), "something was left behind"
    return str(caught.value)


# --- what is honest ---


@pytest.mark.parametrize("into", ["float16", "bfloat16", "float32", "quantized"])
def test_an_honest_export_passes(quantized_run: Path, into: Any, tmp_path: Path) -> None:
    done = export_merged(quantized_run, tmp_path / "merged", into=into)
    saved = json.loads((done.folder / "parity.json").read_text())
    assert saved["figures"] == done.parity.as_data() and saved["figures"]["token_ids_equal"]
    assert saved["figures"]["mean_kl"] < saved["figures"]["effect"] / 2
    readme = (done.folder / "README.md").read_text()
    assert f"| mean_kl | {saved['figures']['mean_kl']:.6g} |" in readme and "parity.json" in readme
    assert done.held == ("4 bits by rtn" if into == "quantized" else into) and done.held in readme
    config = json.loads((done.folder / "config.json").read_text())
    assert ("quantization_config" in config) == (into == "quantized")
    assert {path.stat().st_mode for path in done.folder.iterdir()} == {(done.folder / "README.md").stat().st_mode}


def test_left_to_itself_it_takes_float16_for_a_quantized_base_and_else_the_bases_own(
    quantized_run: Path, tmp_path: Path
) -> None:
    assert export_merged(quantized_run, tmp_path / "a").held == "float16"
    half = base_model(tmp_path / "half")
    tiny_llama(initializer_range=0.2).bfloat16().save_pretrained(half)
    assert export_merged(tuned_run(tmp_path / "on-half", half).folder, tmp_path / "b").held == "bfloat16"


def test_what_a_run_keeps_beside_its_weights_is_kept(base: Path, tmp_path: Path) -> None:
    """The chat template, and a generation config that transformers loads, and would refuse to save."""
    own = base_model(tmp_path / "own")
    settings = {"temperature": 0.6, "do_sample": False, "eos_token_id": [258, 256], "transformers_version": "4.40.0"}
    (own / "generation_config.json").write_text(json.dumps(settings))
    done = export_merged(tuned_run(tmp_path / "run", own).folder, tmp_path / "merged")
    kept = json.loads((done.folder / "generation_config.json").read_text())
    assert {key: kept.get(key) for key in ("temperature", "eos_token_id")} == {
        "temperature": 0.6,
        "eos_token_id": [258, 256],
    }
    assert AutoTokenizer.from_pretrained(done.folder).chat_template == tiny_tokenizer().chat_template


def test_the_merge_of_a_quantized_base_is_not_that_into_the_original(
    quantized_run: Path, base: Path, tmp_path: Path
) -> None:
    done = export_merged(quantized_run, tmp_path / "merged", into="float32")
    model, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (done.folder, base))
    name = "model.layers.0.self_attn.q_proj"
    from hyperion.models import load_tuned

    tuned = load_tuned(quantized_run, dtype="float32")
    layer: Any = tuned.model.get_submodule(f"base_model.model.{name}")
    delta = 4.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    used = layer.base_layer.weight
    merged = model.get_submodule(name).weight
    assert torch.allclose(merged, used + delta, atol=1e-6)
    assert not torch.allclose(merged, original.get_submodule(name).weight + delta, atol=1e-3)


# --- the known faults ---


def scaled(factor: float) -> Callable[..., Any]:
    """The adapter's change, so many times."""
    honest = LoraAdapter.adapter_merge_weight

    def adapter_merge_weight(
        self: Any, model: Any, name: str, module: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple:
        merged, new_bias = honest(self, model, name, module, weight, bias)
        return weight + factor * (merged - weight), new_bias

    return adapter_merge_weight


FAULTS = {"delta lost": 0.0, "twice the delta": 2.0, "alpha / r forgotten": 0.25}
WRONG = pytest.mark.parametrize("factor", FAULTS.values(), ids=FAULTS)


@WRONG
@pytest.mark.parametrize("into", ["float16", "bfloat16", "float32"])
def test_a_wrong_delta_is_caught(
    factor: float, into: Any, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the answers of the whole model alone."""
    monkeypatch.setattr(LoraAdapter, "adapter_merge_weight", scaled(factor))
    monkeypatch.setattr(merged_module, "refuse_other_change", lambda *args: None)
    assert "does not answer as the model that it was made of" in refused(plain_run, tmp_path / "out", into)


@WRONG
@pytest.mark.parametrize("into", ["bfloat16", "quantized"])
def test_a_wrong_delta_is_caught_where_rounding_hides_it(
    factor: float, into: Any, quantized_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are asked one by one, before they are rounded."""
    monkeypatch.setattr(LoraAdapter, "adapter_merge_weight", scaled(factor))
    said = refused(quantized_run, tmp_path / "out", into)
    assert "is not what the adapter does there" in said
    assert f"the weight makes {f'{factor:g} times that' if factor else 'nothing'}" in said


@pytest.mark.parametrize("into", ["float16", "bfloat16", "quantized"])
def test_a_delta_on_the_original_weights_is_caught(
    into: Any, quantized_run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W16 in place of the dequantized W4. Quantized again, it is another rounding of W16 plus delta, and no fault of
    its own: as near as an honest one."""
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    monkeypatch.setattr(merging._Base, "weight", lambda self, name: original.get_submodule(name).weight.detach())
    if into == "quantized":
        export_merged(quantized_run, tmp_path / "merged", into=into)
    else:
        assert "KL divergence" in refused(quantized_run, tmp_path / "out", into)


def lower_case(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))


def another_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_end|>", 1))


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def one_more_token(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    SAVE(tokenizer, folder)


def another_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|pad|>"}))


SAVE = PreTrainedTokenizerFast.save_pretrained


@pytest.mark.parametrize("change", [lower_case, another_template, no_template, one_more_token, another_end])
def test_another_tokenizer_is_caught_whatever_the_tolerance(
    change: Callable[[Path], None], plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_pretrained(self: Any, folder: Path, *args: Any, **kwargs: Any) -> Any:
        written = SAVE(self, folder, *args, **kwargs)
        change(folder)
        return written

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_pretrained)
    with pytest.raises(ArtifactError, match="another tokenizer"):
        export_merged(plain_run, tmp_path / "merged", max_kl=1e9, min_top1=0)
    assert not (tmp_path / "merged").exists()


def swap(tensors: dict[str, torch.Tensor]) -> None:
    one, other = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = math.nan


@pytest.mark.parametrize("into", ["float16", "bfloat16"])
@pytest.mark.parametrize("change", [swap, transpose, spoil])
def test_weights_in_the_wrong_place_are_caught(
    change: Callable[[dict], None], into: Any, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exporting._save_plain

    def save(model: Any, folder: Path) -> None:
        honest(model, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "_save_plain", save)
    refused(plain_run, tmp_path / "out", into, HyperionError)


@pytest.mark.parametrize("bits", [1, 2], ids=["one bit, and it says so", "two bits, and it says four"])
def test_far_too_few_bits_are_caught(
    bits: int, quantized_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import acme_rtn

    honest = acme_rtn.RtnQuantizer.quantizer_requantize

    def quantizer_requantize(self: Any, module: Any, weight: Any, config: Any, bits: int) -> Any:
        if wanted == 1:
            return honest(self, module, weight, config, 2)
        return honest(self, module, self.quantizer_fake_quantize(weight, config, 2, 16), config, bits)

    wanted = bits
    monkeypatch.setattr(acme_rtn.RtnQuantizer, "quantizer_requantize", quantizer_requantize)
    refused(quantized_run, tmp_path / "out", "quantized", HyperionError)


# --- what cannot be merged ---


def test_what_float16_cannot_hold_is_refused_with_what_can(tmp_path: Path) -> None:
    own = base_model(tmp_path / "own")
    model = tiny_llama(initializer_range=0.2)
    model.model.layers[0].input_layernorm.weight.data[0] = 70000.0
    model.save_pretrained(own)
    run = tuned_run(tmp_path / "run", own, adapter={"type": "lora", "target_modules": ["down_proj"]})
    message = refused(run.folder, tmp_path / "out", "float16", CompatibilityError)
    assert "input_layernorm" in message and "65504" in message and "--into bfloat16" in message


def test_who_cannot_merge_says_so(
    quantized_run: Path, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    import acme_rtn

    message = refused(plain_run, tmp_path / "a", "quantized", CompatibilityError)
    assert "is not quantized" in message and "hyperion quantize" in message
    with monkeypatch.context() as patch:
        patch.delattr(acme_rtn.RtnQuantizer, "quantizer_requantize")
        message = refused(quantized_run, tmp_path / "b", "quantized", CompatibilityError)
    assert "quantizer_requantize" in message and "float16" in message
    with monkeypatch.context() as patch:
        without = replace(acme_rtn.RtnQuantizer.provides, dequantize=False)
        patch.setattr(acme_rtn.RtnQuantizer, "provides", without)
        message = refused(quantized_run, tmp_path / "c", "float16", CompatibilityError)
    assert 'quantized by "rtn"' in message and "offline" not in message.partition("fix")[0]
    monkeypatch.setattr(LoraAdapter, "capabilities", replace(LoraAdapter.capabilities, mergeable=False))
    assert '"lora" cannot be merged' in refused(plain_run, tmp_path / "d", None, CompatibilityError)


# --- places and disks ---


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """After `full_disk(bytes)`, no file of this process may grow beyond that: what a quota does, from the kernel."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)

    def limit(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing(
    plain_run: Path, tmp_path: Path, full_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exporting._save_plain

    def save(model: Any, folder: Path) -> None:
        full_disk(20_000)
        honest(model, folder)

    monkeypatch.setattr(exporting, "_save_plain", save)
    message = refused(plain_run, tmp_path / "out", None)
    assert "the merged model cannot be written" in message and "make room" in message


def test_an_interrupted_export_leaves_nothing(plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_save_plain", save)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export_merged(plain_run, tmp_path / "out" / "merged")
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_is_taken_is_left_alone(plain_run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place, says in (("taken", "not empty"), ("file", "a file"), ("file/below", "cannot be written")):
        with pytest.raises(ArtifactError, match=says):
            export_merged(plain_run, tmp_path / place)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export_merged(plain_run, tmp_path / "empty").folder == tmp_path / "empty"
