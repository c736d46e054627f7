"""Base models that are not there, not whole, or none that can be tuned."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from .case import Case, Place

Arrange = Callable[[Place], list[str]]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def named(base_model: str, **changes: Any) -> Arrange:
    """Validate a config with this base model."""
    return lambda place: ["validate", place.config(base_model=base_model, **changes)]


def folder(change: Callable[[Place], None], **changes: Any) -> Arrange:
    """Validate a config whose base is a copy of the tiny model, changed, in the folder "model"."""

    def arrange(place: Place) -> list[str]:
        for path in place.tiny_model.iterdir():
            place.write(f"model/{path.name}", path.read_bytes())
        change(place)
        return ["validate", place.config(base_model="./model", **changes)]

    return arrange


def trained(change: Callable[[Place], None], **changes: Any) -> Arrange:
    """Train on such a base: what only its weights show."""
    return lambda place: ["train", *folder(change, **changes)(place)[1:], "--output_dir", "run"]


def without(*names: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        for name in names:
            for path in (place.folder / "model").glob(name):
                path.unlink()

    return change


def written(name: str, content: str | bytes) -> Callable[[Place], None]:
    return lambda place: void(place.write(f"model/{name}", content))


def void(_: object) -> None:
    pass


def config(**values: Any) -> Callable[[Place], None]:
    """config.json with other values; `...` takes a key out."""
    return _json("config.json", **values)


def _json(name: str, **values: Any) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.folder / "model" / name
        content = {**json.loads(path.read_text(encoding="utf-8")), **values}
        path.write_text(
            json.dumps({key: value for key, value in content.items() if value is not ...}), encoding="utf-8"
        )

    return change


def cut(name: str, keep: float) -> Callable[[Place], None]:
    """A file that breaks off after this share of it."""

    def change(place: Place) -> None:
        path = place.folder / "model" / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return change


def _pickled(place: Place) -> None:
    without(WEIGHTS)(place)
    place.write("model/pytorch_model.bin", b"\x80\x04N.")


def _a_shard_is_missing(place: Place) -> None:
    (place.folder / "model" / WEIGHTS).rename(place.folder / "model/model-00001-of-00002.safetensors")
    shards = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    place.write(f"model/{INDEX}", json.dumps({"weight_map": shards}))


def _tensor(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Place], None]:
    """The header of the weights, changed for one tensor."""

    def edit(place: Place) -> None:
        path = place.folder / "model" / WEIGHTS
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header[name])
        new = json.dumps(header).encode()
        new += b" " * (-len(new) % 8)
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return edit


def _not_a_number(place: Place) -> None:
    path = place.folder / "model" / WEIGHTS
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    first, end = json.loads(content[8 : 8 + length])["model.embed_tokens.weight"]["data_offsets"]
    nans = struct.pack("<f", float("nan")) * ((end - first) // 4)
    path.write_bytes(content[: 8 + length + first] + nans + content[8 + length + end :])


def _larger_vocabulary(place: Place) -> None:
    path = place.folder / "model/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    known = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {f"word{n}": known + 3 + n for n in range(100)}
    path.write_text(json.dumps(content), encoding="utf-8")


def _an_adapter(place: Place) -> list[str]:
    place.write(
        "adapter/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"})
    )
    place.write("adapter/adapter_model.safetensors", b"")
    return named("./adapter")(place)


def _of_type(architecture: str, **values: Any) -> Arrange:
    return folder(config(architectures=[architecture], **values))


def _a_diffusion_pipeline(place: Place) -> list[str]:
    place.write("diffusion/model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"}))
    place.write("diffusion/unet/config.json", "{}")
    return named("./diffusion")(place)


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(architecture: str = "llama", kind: int = 0, cut: int = 0, start: bytes = b"GGUF", version: int = 3) -> Arrange:
    """Validate a config whose base is a GGUF file of one tensor."""

    def arrange(place: Place) -> list[str]:
        header = start + struct.pack("<IQQ", version, 1, 1)
        header += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
        header += text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 4, kind, 0)
        header += b"\0" * (-len(header) % 32)
        content = header + b"\0" * (32 * 4 * 4)
        place.write("model.gguf", content[: len(content) - cut])
        return named("./model.gguf")(place)

    return arrange


def _a_package(inside: str) -> Arrange:
    """Validate a config whose base is this path in an installed package."""

    def arrange(place: Place) -> list[str]:
        installed = place.fake_dist("acme-models", {}, {"acme_models/__init__.py": ""})
        (installed / "acme_models/tiny.gguf").write_bytes(b"")
        return named(f"package://acme_models/{inside}")(place)

    return arrange


def _the_weights_alone(place: Place) -> list[str]:
    folder(void)(place)
    return named(f"./model/{WEIGHTS}")(place)


def _offline(place: Place) -> list[str]:
    return ["train", place.config(base_model="owner/model"), "--output_dir", "run"]


def _address_with_a_password(place: Place) -> list[str]:
    return named("https://me:hunter2-hunter2@huggingface.co/owner/model")(place)


def case(what: str, arrange: Arrange, *says: str) -> Case:
    return Case("model", what, arrange, says)


CASES: tuple[Case, ...] = (
    # Where it is.
    case("the folder is not there", named("./modle"), "base_model './modle' does not exist"),
    case("a name that is neither", named("my model"), "is no hub id and no local path", "write owner/name"),
    case("an address of the web", named("https://huggingface.co/owner/model"), "base_model: owner/model"),
    case("an address with a password in it", _address_with_a_password, "https://***@huggingface.co", "holds a secret"),
    case("a package that is not installed", named("package://no_such_package/model.gguf"), "which is not installed"),
    case("a file that the package lacks", _a_package("tiny.guf"), "has no 'tiny.guf'", "did you mean tiny.gguf"),
    case("a path out of the package", _a_package("../../secrets/model.gguf"), "would leave the package"),
    case("a revision of a local model", folder(void, revision="main"), "is local, and revision 'main' was given"),
    case("a folder without config.json", folder(without("config.json")), "without config.json"),
    case("one file of a model", named("model/model.safetensors"), "does not exist"),
    case("the weights' file in place of the folder", _the_weights_alone, "is one file of a model"),
    case("a hub model, and no network", _offline, "is not in the local cache", "hf download owner/model"),
    # config.json.
    case("config.json is no JSON", folder(written("config.json", '{"model_type": "llama",')),
         "config.json cannot be read"),
    case("config.json is a list", folder(written("config.json", "[]")), "config.json cannot be read", "no mapping"),
    case("an architecture that transformers does not know", folder(config(model_type="llamma",
         architectures=["LlammaForCausalLM"])), "llamma",
         "llama"),
    case("config.json without model_type", folder(config(model_type=...)), "model_type"),
    case("config.json without the sizes", folder(config(hidden_size=..., vocab_size=...)), "hidden_size, vocab_size"),
    case("a width that the heads do not divide",
         folder(config(num_attention_heads=5, num_key_value_heads=5, head_dim=...)),
         "hidden_size 32", "num_attention_heads 5"),
    case("key-value heads that do not divide the heads", folder(config(num_key_value_heads=3)),
         "num_key_value_heads 3"),
    case("a negative width", folder(config(hidden_size=-32)), "hidden_size is -32"),
    case("a width in quotes", folder(config(hidden_size="32")), "hidden_size is '32'"),
    case("a model with code of its own", folder(config(model_type="mine",
         auto_map={"AutoModelForCausalLM": "mine.Mine"})),
         "trust_remote_code"),
    case("an encoder (BERT)", _of_type("BertForMaskedLM", model_type="bert"), "not a causal language model"),
    case("an encoder and decoder (T5)", _of_type("T5ForConditionalGeneration", model_type="t5",
         is_encoder_decoder=True),
         "encoder-decoder"),
    case("a diffusion model", _a_diffusion_pipeline, "diffusion"),
    case("an adapter in place of its base", _an_adapter, "holds an adapter", "base_model_name_or_path"),
    # The weights.
    case("no weights", folder(without(WEIGHTS)), "has no .safetensors weights"),
    case("pickled weights alone", folder(_pickled), "pytorch_model.bin", "any code"),
    case("weights that break off", folder(cut(WEIGHTS, 0.5)), "not a whole safetensors file", "cut short"),
    case("weights whose header breaks off", folder(cut(WEIGHTS, 0.001)), "not a whole safetensors file"),
    case("weights that are an empty file", folder(cut(WEIGHTS, 0)), "not a whole safetensors file"),
    case("a Git LFS pointer in place of the weights",
         folder(written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")),
         "not a whole safetensors file", "git lfs pull"),
    case("one of the weights' files is missing", folder(_a_shard_is_missing), "model-00002-of-00002.safetensors"),
    case("an index that is no index", folder(written(INDEX, '{"weight_map": []}')), "is no index of weights"),
    case("weights of another vocabulary", folder(config(vocab_size=300)), "other shapes than config.json says",
         "model.embed_tokens"),
    case("weights of fewer layers", folder(config(num_hidden_layers=3)), "weights are missing", "model.layers.2"),
    case("a tensor of a shape that its bytes do not fill",
         folder(_tensor("model.norm.weight", lambda tensor: tensor.update(shape=[64]))),
         "not a whole safetensors file"),
    case("weights that are not numbers", trained(_not_a_number), "not finite (NaN or infinity)",
         "model.embed_tokens.weight"),
    # The tokenizer.
    case("no tokenizer", folder(without("tokenizer*")), "has no tokenizer"),
    case("a tokenizer that breaks off", folder(cut("tokenizer.json", 0.5)), "tokenizer.json cannot be read"),
    case("a tokenizer with settings that are no JSON", folder(written("tokenizer_config.json", "{")),
         "tokenizer_config.json cannot be read"),
    case("a tokenizer of a kind that no library knows", folder(_json("tokenizer.json", model={"type": "Magic",
         "vocab": {}})),
         "an unknown kind: 'Magic'"),
    case("a tokenizer of another model", folder(_larger_vocabulary), "359 tokens", "259"),
    # GGUF.
    case("a GGUF file that breaks off", gguf(cut=100), "not a whole GGUF file", "cut short"),
    case("a GGUF file whose header breaks off", gguf(cut=560), "not a whole GGUF file"),
    case("a file called .gguf that is none", gguf(start=b"\x89PNG"), "is not a GGUF file"),
    case("a GGUF file of a format to come", gguf(version=9), "format version is 9"),
    case("GGUF weights of an unknown type", gguf(kind=77), "type 77"),
    case("GGUF weights of an architecture that is not read", gguf("rwkv9"), "rwkv9"),
)  # fmt: skip
