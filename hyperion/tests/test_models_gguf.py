"""Conversion of a GGUF file written on the fly: a two-layer Llama in float32 with a byte-level BPE tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import ModelError

from hyperion.models.gguf import convert_gguf
from hyperion.models.load import load_model, load_tokenizer

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def tiny_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello", "<|end|>", "<|turn|>"]


def permuted(weight: Any, heads: int) -> Any:
    """llama.cpp stores the rows of Llama's queries and keys in another order."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def write_gguf(path: Path, model: Any, scaling: str | None = None, drop: str = "", extra: str = "") -> Path:
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    config, tokens = model.config, vocabulary()
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_eot_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = permuted(weight, HEADS if "q_proj" in name else KV_HEADS)
        stored = names.get_name(name, (".weight",))
        if stored != drop:
            writer.add_tensor(stored, np.ascontiguousarray(weight))
    if extra:
        writer.add_tensor(extra, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def original() -> Any:
    return tiny_llama()


def silent(message: str) -> None:
    pass


def test_the_converted_model_is_the_one_in_the_file(original: Any, tmp_path: Path) -> None:
    import torch

    path = write_gguf(tmp_path / "tiny model.Q.gguf", original)
    folder = convert_gguf(path, tmp_path / "cache", silent)
    assert folder.parent == tmp_path / "cache" / "models"
    assert folder.name.startswith("tiny-model.Q-")
    model = load_model(folder, dtype="float32", device="cpu")
    ours, theirs = model.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = torch.arange(10).reshape(1, -1)
    assert torch.equal(model(ids).logits, original.eval()(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    end = len(vocabulary()) - 2
    assert model.generation_config.eos_token_id == [end, end + 1]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("hello") == ["hello"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end
    assert tokenizer.chat_template == TEMPLATE
    record = json.loads((folder / "conversion.json").read_text())
    assert (record["source"], record["dtype"]) == (path.name, "float32")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "conversion.json"])
def test_a_damaged_conversion_is_made_again(original: Any, tmp_path: Path, name: str) -> None:
    messages: list[str] = []
    path = write_gguf(tmp_path / "a.gguf", original)
    folder = convert_gguf(path, tmp_path / "cache", messages.append)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert convert_gguf(path, tmp_path / "cache", messages.append) == folder
    assert (folder / name).read_bytes() == whole
    assert any("is damaged: it is made again" in message for message in messages)


def test_the_second_time_it_is_only_looked_up(original: Any, tmp_path: Path) -> None:
    messages: list[str] = []
    path = write_gguf(tmp_path / "a.gguf", original)
    first = convert_gguf(path, tmp_path / "cache", messages.append)
    said = len(messages)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(path, tmp_path / "cache", messages.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(messages) == said
    # Other weights under the same file name are another model.
    original.lm_head.weight.data.mul_(2)
    assert convert_gguf(write_gguf(path, original), tmp_path / "cache", silent) != first


def test_what_a_dead_process_left_is_cleaned(original: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", original)
    folder = convert_gguf(path, tmp_path / "cache", silent)
    shutil.rmtree(folder)
    leftover = folder.parent / f".{folder.name}.4711.partial"
    leftover.mkdir()
    assert convert_gguf(path, tmp_path / "cache", silent) == folder
    assert not leftover.exists()
    assert {entry.name for entry in folder.parent.iterdir() if entry.is_dir()} == {folder.name}


def test_a_conversion_that_fails_leaves_nothing(original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "a.gguf", original)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ModelError, match="No space left") as error:
        convert_gguf(path, tmp_path / "cache", silent)
    assert "HYPERION_CACHE" in error.value.fix
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_weights_that_bfloat16_holds_exactly_are_stored_in_it(original: Any, tmp_path: Path) -> None:
    import torch

    original.load_state_dict({name: value.bfloat16().float() for name, value in original.state_dict().items()})
    folder = convert_gguf(write_gguf(tmp_path / "a.gguf", original), tmp_path / "cache", silent)
    assert json.loads((folder / "conversion.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(folder, dtype="float32", device="cpu").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in original.state_dict().items())


def test_two_processes_convert_once(original: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", original)
    code = f"""
from pathlib import Path
from hyperion.models.gguf import convert_gguf
print(convert_gguf(Path({str(path)!r}), Path({str(tmp_path / "cache")!r}), print))
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    said = [out.splitlines() for out, _ in results]
    assert sum(line.startswith("converting") for lines in said for line in lines) == 1
    assert said[0][-1] == said[1][-1]


def test_what_transformers_would_read_with_loss_is_refused(original: Any, tmp_path: Path) -> None:
    scaled = write_gguf(tmp_path / "scaled.gguf", original, scaling="yarn")
    with pytest.raises(ModelError, match=r"rotary positions \(yarn\)"):
        convert_gguf(scaled, tmp_path / "cache", silent)
    # A tensor that is left out would be random; one too many would be ignored.
    lacking = write_gguf(tmp_path / "lacking.gguf", original, drop="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(lacking, tmp_path / "cache", silent)
    extra = write_gguf(tmp_path / "extra.gguf", original, extra="rope_freqs.weight")
    with pytest.raises(ModelError, match="without loss"):
        convert_gguf(extra, tmp_path / "cache", silent)


def test_a_damaged_or_unsupported_file_is_refused(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "a.gguf", original)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match="cut short"):
        convert_gguf(path, tmp_path / "cache", silent)
    path.write_bytes(whole.replace(b"llama", b"lemma"))
    with pytest.raises(ModelError, match="architecture 'lemma'"):
        convert_gguf(path, tmp_path / "cache", silent)
    path.write_bytes(whole)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        convert_gguf(path, tmp_path / "cache", silent)
