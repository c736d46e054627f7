from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hyperion_core.errors import ModelError

from hyperion.models.load import load_model, load_tokenizer, materialize
from hyperion.models.new_tokens import add_to_tokenizer, grow_embeddings
from hyperion.models.source import BaseModelSource, resolve_source

WORDS = ["<unk>", "</s>", "the", "cat", "sat", "on", "mat"]


def silent(message: str) -> None:
    pass


def make_model(tied: bool = False, rows: int = len(WORDS), **values: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        **{"bos_token_id": 1, "eos_token_id": 1, **values},
    )
    return LlamaForCausalLM(config)


def make_tokenizer(**special: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


# --- loading ----------------------------------------------------------------------------------------


def test_a_local_folder_loads_as_it_was_saved(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    assert materialize(resolve_source(str(folder)), tmp_path, silent) == folder
    capfd.readouterr()
    model = load_model(folder, dtype="bfloat16", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = make_model().state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.state_dict().items())


def test_load_kwargs_reach_from_pretrained(folder: Path) -> None:
    model = load_model(folder, dtype="float32", device="cpu", load_kwargs={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    make_model(tied=True).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_do_not_fit_are_refused_by_name(folder: Path) -> None:
    import torch

    def load() -> Any:
        return load_model(folder, dtype="float32", device="cpu")

    change_weights(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}))
    with pytest.raises(ModelError, match="leave out") as extra:
        load()
    assert "model.layers.0.mlp.up_proj.bias" in extra.value.why
    change_weights(folder, lambda weights: weights.pop("model.layers.0.mlp.up_proj.bias"))
    change_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.v_proj.weight"))
    with pytest.raises(ModelError, match="filled at random") as missing:
        load()
    assert missing.value.why == "model.layers.1.self_attn.v_proj.weight"
    change_weights(
        folder, lambda weights: weights.update({"model.layers.1.self_attn.v_proj.weight": torch.ones(8, 64)})
    )
    with pytest.raises(ModelError, match="other shapes") as wrong:
        load()
    assert "(8, 64) instead of (64, 64)" in wrong.value.why


def test_an_extra_part_is_left_out_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    change_weights(folder, lambda weights: weights.update({"vision_tower.patch.weight": torch.ones(2, 2)}))
    with caplog.at_level(logging.WARNING, "hyperion"):
        load_model(folder, dtype="float32", device="cpu")
    assert "vision_tower.patch.weight" in caplog.text


def test_what_cannot_be_loaded_says_why(folder: Path) -> None:
    change_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match="not a causal language model"):
        load_model(folder, dtype="float32", device="cpu")
    change_config(folder, architectures=["LlamaForCausalLM"], model_type="made-up")
    with pytest.raises(ModelError, match="knows its model_type"):
        load_model(folder, dtype="float32", device="cpu")
    change_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_model(folder, dtype="float32", device="cpu")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle can run any code"):
        materialize(resolve_source(str(folder)), tmp_path, silent)
    with pytest.raises(ModelError):
        load_model(folder, dtype="float32", device="cpu")


def test_transformers_is_as_loud_afterwards_as_before(folder: Path) -> None:
    from transformers.utils import logging as noise

    before = noise.get_verbosity(), noise.is_progress_bar_enabled()
    load_model(folder, dtype="float32", device="cpu")
    assert (noise.get_verbosity(), noise.is_progress_bar_enabled()) == before


# --- tokenizer --------------------------------------------------------------------------------------


def test_padding_without_a_pad_token_adds_no_row(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, len(tokenizer)) == ("</s>", len(WORDS))
    batch = tokenizer(["the cat </s>", "the"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_a_pad_token_of_its_own_is_kept(folder: Path) -> None:
    make_tokenizer(eos_token="</s>", pad_token="mat").save_pretrained(folder)
    assert load_tokenizer(folder).pad_token == "mat"


def test_tokenizers_that_are_of_no_use_are_refused(folder: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="end-of-sequence"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(folder)


# --- the hub ----------------------------------------------------------------------------------------


def hub(name: str = "owner/model", revision: str | None = None) -> BaseModelSource:
    return BaseModelSource(name, "hub", None, revision)


def test_offline_without_the_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set") as error:
        materialize(hub(), tmp_path, silent)
    assert "hf download owner/model" in error.value.fix
    assert error.value.__cause__ is not None


def test_offline_with_the_model_in_the_cache_loads_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / "abc")
    found = materialize(resolve_source("owner/model"), tmp_path, silent)
    assert found == repo / "snapshots" / "abc"
    (found / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="without its weights"):
        materialize(hub(), tmp_path, silent)


def failing(error: str, status: int) -> Any:
    from huggingface_hub import errors

    kind = getattr(errors, error)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no answer")
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("error", "status", "fix"),
    [
        ("GatedRepoError", 403, "hf auth login"),
        ("RepositoryNotFoundError", 404, "check the spelling"),
        ("RevisionNotFoundError", 404, "owner/model/commits"),
        ("LocalEntryNotFoundError", 0, "check the network"),
        ("HfHubHTTPError", 500, "try again later"),
        ("disk", 0, "free some space"),
    ],
)
def test_each_fault_of_a_download_has_its_fix(
    error: str, status: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = OSError(28, "No space left on device") if error == "disk" else failing(error, status)

    def download(*_: Any, **__: Any) -> None:
        raise cause

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError) as refused:
        materialize(hub(revision="v9"), tmp_path, silent)
    assert fix in refused.value.fix
    assert refused.value.__cause__ is cause


def test_only_what_is_needed_is_downloaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    wanted = {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"}
    others = {"pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/params.json", "consolidated.safetensors"}

    def files() -> set[str]:
        patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
        return set(filter_repo_objects(wanted | others | {"modeling_own.py"}, **patterns))

    assert materialize(hub(revision="v2"), tmp_path, silent) == folder
    assert (asked["name"], asked["revision"]) == ("owner/model", "v2")
    assert files() == wanted
    materialize(hub(), tmp_path, silent, revision="v3", trust_remote_code=True)
    assert asked["revision"] == "v3"
    assert files() == wanted | {"modeling_own.py"}


@pytest.mark.parametrize(("file", "why"), [("pytorch_model.bin", "pickled"), ("a.Q4.gguf", "GGUF files only")])
def test_a_hub_model_without_safetensors_says_what_it_has(
    file: str, why: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["config.json", file])
    with pytest.raises(ModelError, match=r"no \.safetensors weights") as error:
        materialize(hub(), tmp_path, silent)
    assert why in error.value.why and file in error.value.why


# --- new tokens -------------------------------------------------------------------------------------


def add_new_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> list[int]:
    ids = add_to_tokenizer(tokenizer, tokens)
    grow_embeddings(model, tokenizer, ids)
    return ids


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_row_and_nothing_else_changes(tied: bool) -> None:
    import torch

    model, tokenizer = make_model(tied), make_tokenizer(eos_token="</s>")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    ids = add_new_tokens(model, tokenizer, ["<ticket>", "<urgent>"])
    assert torch.equal(torch.get_rng_state(), random)
    assert ids == [7, 8] == tokenizer.convert_tokens_to_ids(["<ticket>", "<urgent>"])
    for name, value in model.state_dict().items():
        assert torch.equal(value[:7] if len(value) == 9 else value, before[name]), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = before[name].mean(dim=0)
        torch.testing.assert_close(model.state_dict()[name][7:], torch.stack([mean, mean]))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == 9


def test_new_tokens_show_in_generated_text() -> None:
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    (new,) = add_new_tokens(model, tokenizer, ["<ticket>"])
    assert tokenizer.encode("the <ticket> sat", add_special_tokens=False) == [2, new, 4]
    assert "<ticket>" in tokenizer.decode([2, new, 1], skip_special_tokens=True)


def test_spare_rows_are_used_first() -> None:
    import torch

    model, tokenizer = make_model(rows=16), make_tokenizer(eos_token="</s>")
    weight = model.model.embed_tokens.weight
    used = weight[: len(WORDS)].mean(dim=0)
    assert add_new_tokens(model, tokenizer, ["<ticket>"]) == [7]
    assert model.model.embed_tokens.weight is weight and len(weight) == 16
    torch.testing.assert_close(weight[7], used)


def test_new_tokens_reload_with_the_model(tmp_path: Path) -> None:
    import torch

    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>")
    (new,) = add_new_tokens(model, tokenizer, ["<ticket>"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert load_tokenizer(tmp_path).convert_tokens_to_ids("<ticket>") == new


@pytest.mark.parametrize(
    ("tokens", "what"),
    [([" "], "empty"), (["<a>", "<a>"], "twice"), (["cat"], "already knows"), (["</s>"], "already knows")],
)
def test_bad_new_tokens_change_nothing(tokens: list[str], what: str) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    with pytest.raises(ModelError, match=what):
        add_to_tokenizer(tokenizer, ["<good>", *tokens])
    assert len(tokenizer) == len(WORDS)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="rows for 5"):
        add_new_tokens(make_model(rows=5), make_tokenizer(eos_token="</s>"), ["<ticket>"])
    with pytest.raises(ModelError, match="rows for 5"):
        add_new_tokens(make_model(rows=5), make_tokenizer(eos_token="</s>"), [])
    assert add_new_tokens(make_model(), make_tokenizer(eos_token="</s>"), []) == []
