"""Streamed weights are the file's, before and after they leave memory; recomputed layers are the ones asked for."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from hyperion_core.errors import ModelError
from safetensors.torch import load_file, save_file

from hyperion.acceleration.streaming import mapped_model, streamed
from hyperion.models.load import load_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="weights are not streamed on Windows")
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(params=["Llama", "tied Llama", "Qwen3"])
def folder(request, tmp_path):
    kind = request.param.split()[-1]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WIDE, tie_word_embeddings=request.param.startswith("tied"))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def resident(weight):
    """KiB of a tensor's mapping that are in memory."""
    address, found = weight.data_ptr(), False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first:
                low, high = (int(end, 16) for end in first.split("-"))
                found = low <= address < high
            elif found and first == "Rss:":
                return int(line.split()[1])
    raise AssertionError("no mapping holds it")


def outcome(model):
    model.requires_grad_(False)
    x = torch.randn(1, 9, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    logits = model(inputs_embeds=x).logits
    logits.float().square().sum().backward()
    return logits.detach(), x.grad


def test_it_computes_what_the_loaded_model_computes(folder):
    loaded = load_model(folder, dtype="bfloat16", device="cpu")
    mapped = load_model(folder, dtype="bfloat16", device="cpu", mapped=True)
    assert mapped.generation_config.max_new_tokens == 7
    assert not any(parameter.is_meta for parameter in (*mapped.parameters(), *mapped.buffers()))
    expected = outcome(loaded)
    mapped.requires_grad_(False)
    with streamed(mapped):
        for _ in range(2):
            for mine, own in zip(outcome(mapped), expected, strict=True):
                assert torch.equal(mine, own)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(parameter, stored[name]) for name, parameter in mapped.named_parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_layer_leaves_memory_when_it_is_done(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**WIDE, "hidden_size": 1024, "intermediate_size": 4096})
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = mapped_model(tmp_path, torch.bfloat16).requires_grad_(False)
    weight = model.model.layers[1].mlp.up_proj.weight
    x = torch.randn(1, 9, 1024).bfloat16().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    whole = resident(weight)
    seen = []
    with streamed(model):
        out = model(inputs_embeds=x).logits
        seen.append(resident(weight))
        out.sum().backward()
        seen.append(resident(weight))
    assert whole > 3 * 20_000
    assert max(seen) < whole / 5


def test_what_was_changed_in_memory_stays(folder):
    model = mapped_model(folder, torch.bfloat16).requires_grad_(False)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    written, replaced = (next(iter(layer.parameters())) for layer in layers[:2])
    written.fill_(2.0)
    replaced.data = torch.full_like(replaced, 3.0)
    with streamed(model):
        outcome(model)
    assert (written == 2.0).all() and (replaced == 3.0).all()


def test_files_that_do_not_fit_are_refused(folder):
    with pytest.raises(ModelError, match="cannot be streamed") as caught:
        mapped_model(folder, torch.float32)
    assert caught.value.fix.startswith("set dtype: bfloat16")
    file = min(folder.glob("*.safetensors"))
    save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="names are not those"):
        mapped_model(folder, torch.bfloat16)


def test_a_weight_that_is_not_finite_is_refused(folder):
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match="not finite"):
        load_model(folder, dtype="bfloat16", device="cpu", mapped=True)
