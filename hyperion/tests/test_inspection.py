"""What `hyperion inspect` says is what lies in the files, for any kind of checkpoint; a damaged one is told as such."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import HyperionError
from typer.testing import CliRunner

from hyperion.inspection.modules import summed
from hyperion.inspection.report import inspect_model


def printed(*arguments: object) -> str:
    import typer

    from hyperion.cli.inspect import inspect

    app = typer.Typer()
    app.command()(inspect)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def pack(base: Path, folder: Path, drop: str = "") -> Path:
    """A quantized checkpoint as bitsandbytes lays it out, made of a plain one: bytes, and scales beside them."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name and name != drop]:
        count = tensors[name].numel()
        tensors[name] = torch.zeros(count // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.zeros(count // 16, dtype=torch.float16)
        tensors[f"{name}.quant_state.rtn"] = torch.zeros(8, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rtn", "symmetric": False, "modules": {
        f"model.layers.{layer}.{block}.{name}_proj": [3 if name == "up" else 4, 16]
        for layer in range(2)
        for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in names
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_plain_model_by_kind_of_module(tiny_model: Path) -> None:
    found = inspect_model(str(tiny_model))
    model = found.model
    assert model is not None and model.parameters == 32096 and model.quantization is None
    kinds = {kind.kind: (kind.count, kind.bits, kind.stored) for kind in summed(model.modules)}
    assert kinds == {"linear": (14, 32, "F32"), "head": (1, 32, "F32"), "embedding": (1, 32, "F32"),
                     "norm": (5, 32, "F32")}  # fmt: skip
    on_disk = sum(path.stat().st_size for path in tiny_model.iterdir())
    assert found.nbytes == on_disk and sum(model.dtypes.values()) == 4 * 32096
    text = printed(tiny_model, "--modules")
    assert "14 linear: 32 bits (F32)" in text and "model.layers.1.mlp.down_proj" in text


def test_buffers_and_fused_experts_are_not_taken_for_packed_weights(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path / "carries-buffers"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)  # GPT-2's causal mask, as published
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")
    model = inspect_model(str(folder)).model
    assert model is not None and model.mean_bits == 32
    kinds = {(kind.kind, kind.stored): (kind.count, kind.bits) for kind in summed(model.modules)}
    assert kinds["linear", "F32"] == (14, 32) and kinds["buffer", "U8"] == (2, 8) and kinds["buffer", "F32"] == (4, 32)

    experts = GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, head_dim=8,
    )  # fmt: skip
    GptOssForCausalLM(experts).save_pretrained(tmp_path / "experts")
    model = inspect_model(str(tmp_path / "experts")).model
    assert model is not None
    fused = [kind for kind in summed(model.modules) if kind.kind == "experts"]
    assert [(kind.count, kind.bits) for kind in fused] == [(4, 32)]
    assert model.mean_bits == 32 and sum(module.nbytes for module in model.modules) == sum(model.dtypes.values())


def test_packed_modules_have_the_bits_that_their_plugin_reads(fake_dist: Any, tiny_model: Path, tmp_path: Path) -> None:
    packed = pack(tiny_model, tmp_path / "packed", drop="model.layers.1.mlp.down_proj.weight")
    unread = inspect_model(str(packed))
    assert unread.model is not None and unread.model.quantization is not None
    assert unread.model.quantization.reader is None and unread.model.parameters == 32096
    about = next(module for module in unread.model.modules if module.name.endswith("0.mlp.up_proj"))
    # 4 bits a weight, a scale of 16 bits for 16 weights, 8 bytes of state
    assert not about.exact and about.bits == pytest.approx(5 + 8 * 8 / (48 * 32))

    source = (files("hyperion") / "plugin_templates" / "quantizer" / "plugin.py").read_text(encoding="utf-8")
    module = source.replace("changeme", "rtn").replace("Changeme", "Rtn")
    fake_dist("acme-rtn", {"hyperion.quantizers": {"rtn": "acme_rtn:RtnQuantizer"}}, {"acme_rtn": module})
    model = inspect_model(str(packed)).model
    assert model is not None and model.quantization is not None and model.quantization.owner == "acme-rtn 1.0"
    bits = {module.name: (module.bits, module.group_size) for module in model.modules if module.kind == "linear"}
    assert bits["model.layers.0.mlp.up_proj"] == (3, 16) and bits["model.layers.0.self_attn.q_proj"] == (4, 16)
    assert bits["model.layers.1.mlp.down_proj"] == (32, 0), "the file holds it whole, whatever config.json says"
    text = printed(packed)
    assert "11 linear: 4 bits, groups of 16" in text and "2 linear: 3 bits, groups of 16" in text
    assert json.loads(printed(packed, "--json"))["model"]["quantization"]["reader"] == "rtn"


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for layer in range(3):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = torch.zeros(4, 32), torch.zeros(32, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": "owner/base"}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = inspect_model(str(tmp_path))
    assert found.model is None and found.adapter is not None
    adapter = found.adapter
    assert (adapter.type, adapter.base_model, adapter.parameters) == ("lora", "owner/base", 768)
    assert adapter.ranks == {4: 3} and adapter.targets == {"q_proj": 3}
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(HyperionError, match="does not hold it"):
        inspect_model(str(tmp_path))


def test_a_gguf_has_the_types_of_its_tensors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    kinds = gguf.GGMLQuantizationType
    for name, shape, kind in (("token_embd.weight", (8, 64), None), ("blk.0.attn_q.weight", (64, 64), kinds.Q4_0),
                              ("blk.0.attn_norm.weight", (64,), None)):  # fmt: skip
        values = np.zeros(shape, dtype=np.float32)
        writer.add_tensor(name, values if kind is None else gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = inspect_model(str(tmp_path / "tiny.gguf")).model
    assert model is not None and model.parameters == 8 * 64 + 64 * 64 + 64
    found = {module.name: (module.kind, module.stored, module.bits) for module in model.modules}
    assert found["blk.0.attn_q"] == ("linear", "Q4_0", 4.5), "18 bytes for 32 weights"
    assert found["token_embd"][:2] == ("embedding", "F32") and found["blk.0.attn_norm"][0] == "norm"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "it is cut short"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "there is no model in"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
         "lacks 1 of its 1 weight files"),
        (lambda folder: (folder / "bit_plan.json").write_text("[]"), "is not a bit plan"),
        (lambda folder: (folder / "plan.json").write_text("{}") and (folder / "config.json").unlink(),
         "is no finished artifact"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_told_as_such(damage: Any, expected: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(HyperionError, match=expected):
        inspect_model(str(tmp_path / "model"))


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base_model: x")
    with pytest.raises(HyperionError, match=r"config\.yaml is no model"):
        inspect_model(str(tmp_path / "config.yaml"))


def test_it_imports_nothing_heavy(tiny_model: Path) -> None:
    code = (
        "import sys; from hyperion.inspection.report import inspect_model; inspect_model(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
