"""`inspect_model`: everything that files tell of a model, in one record. Torch-free."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hyperion_core.artifact import MANIFEST, Artifact
from hyperion_core.errors import HyperionError, ModelError, PluginError
from hyperion_core.facts import BitPlan, ModelFacts
from hyperion_core.hooks import RunHooks
from hyperion_core.registry import registry

from ..models.facts import check_causal_lm, model_facts, read_config, read_json
from ..models.source import BaseModelSource, resolve_source
from ..planning_hooks import PlanningHooks
from ..quantization.existing import reader_of, saved_quantization
from .adapter import AdapterPart, adapter_in, holds_adapter
from .modules import ModuleBits, modules_in_folder, modules_in_gguf, summed
from .tensors import StoredTensor, gguf_of, safetensors_of, weight_files

_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PARITY, _BIT_PLAN, _PLAN, _QUANTIZED = "parity.json", "bit_plan.json", "plan.json", "quantized.json"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized: what its config.json says, which installed plugin reads that, and what it makes of
    it. `unread` says why nobody could."""

    method: str
    config: Mapping[str, Any]
    reader: str | None = None
    owner: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: str = ""


@dataclass(frozen=True)
class ModelPart:
    """A model's own weights. `parameters` is None where packed tensors do not tell them; `why` says so."""

    architecture: str
    model_type: str
    parameters: int | None
    why: str
    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    tied_embeddings: bool
    dtypes: Mapping[str, int]
    modules: tuple[ModuleBits, ...]
    quantization: Quantization | None = None
    pickles: tuple[str, ...] = ()

    @property
    def mean_bits(self) -> float | None:
        """Of the linear modules' weights, without scales where they are told exactly; None where one is unknown."""
        linear = [(m.bits, math.prod(m.shape)) for m in self.modules if m.kind == "linear" and m.shape]
        if not linear or any(bits is None for bits, _ in linear):
            return None
        return sum((bits or 0) * weights for bits, weights in linear) / sum(weights for _, weights in linear)


@dataclass(frozen=True)
class Inspection:
    """What there is: a model, an adapter, or both. `files`: bytes on the disk by part; `changed`: files of an artifact
    that are gone, or not as the run wrote them."""

    name: str
    path: Path
    model: ModelPart | None
    adapter: AdapterPart | None
    files: Mapping[str, int]
    versions: Mapping[str, str]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    bit_plan: Mapping[int, int] | None = None
    changed: tuple[str, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {**asdict(self), "path": str(self.path), "bytes": self.nbytes}
        if self.model is not None:
            kinds = [{**asdict(each), "described": each.described} for each in summed(self.model.modules)]
            data["model"] |= {"bits": kinds, "mean_bits": self.model.mean_bits}
        return data


def inspect_model(name: str, revision: str | None = None) -> Inspection:
    """What is in a model folder, a hub model of the local cache, a GGUF file, an adapter's folder or an artifact.

    Raises:
        HyperionError: it is none of these, or a file of it is damaged, cut short or missing.
    """
    source = _found(name, revision)
    assert source.path is not None
    if source.kind == "gguf":
        whole = _gguf_part(source)
        weights = _by_kind(whole.modules)
        rest = source.path.stat().st_size - sum(weights.values())
        return Inspection(name, source.path, whole, None, {**weights, "header": rest}, {})
    folder = source.path
    adapter = adapter_in(folder) if holds_adapter(folder) else None
    model = _model_part(source) if (folder / "config.json").is_file() else None
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    record = read_json(folder / _QUANTIZED) if (folder / _QUANTIZED).is_file() else {}
    versions = dict(manifest.get("versions") or record.get("versions") or {})
    if model is not None and not versions:
        made = read_config(folder).get("transformers_version")
        versions = {"transformers": str(made)} if made else {}
    return Inspection(
        name=name,
        path=folder,
        model=model,
        adapter=adapter,
        files=_bytes_by_part(folder, model, adapter),
        versions=versions,
        metrics=dict(manifest.get("metrics") or {}),
        parity=read_json(folder / _PARITY) if (folder / _PARITY).is_file() else None,
        bit_plan=_planned_bits(folder / _BIT_PLAN),
        changed=tuple(Artifact(folder, {}).changed_files()) if manifest else None,
    )


def _found(name: str, revision: str | None) -> BaseModelSource:
    folder = Path(name).expanduser()
    if revision is None and folder.is_dir():
        if holds_adapter(folder):
            return BaseModelSource(name, "local", folder.absolute(), None)
        if (folder / _PLAN).is_file() and not (folder / "config.json").is_file():
            Artifact.read(folder)  # raises: the run did not end
    looked_for = "a model folder holds config.json, an adapter's adapter_config.json; of single files only GGUF is read"
    if folder.is_file() and folder.suffix.lower() != ".gguf":
        raise ModelError(f"{name} is no model", why=looked_for, fix="name the model's folder, or a GGUF file")
    if folder.is_dir() and not any((folder / known).exists() for known in ("config.json", "model_index.json")):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".gguf")
        there = f"name one of what is inside: {', '.join(inside[:5])}" if inside else "name the model's folder"
        raise ModelError(f"there is no model in {folder}", why=looked_for, fix=there)
    source = resolve_source(name, revision)
    if source.path is None and (cached := _cached_adapter(name, revision)):
        return BaseModelSource(name, "hub", cached, revision)
    if source.path is None:
        raise ModelError(
            f"{name!r} is not in the local cache of the hub, and there is no such folder",
            why="only files that are here are looked at",
            fix=f"fetch it: hf download {name}",
        )
    return source


def _cached_adapter(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "adapter_config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _model_part(source: BaseModelSource) -> ModelPart:
    assert source.path is not None
    config = read_config(source.path)
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(source.path):
        tensors |= safetensors_of(path)
    pickles = tuple(sorted(path.name for path in source.path.iterdir() if path.suffix in _PICKLES))
    facts = _facts(source, config)
    saved = saved_quantization(source.path)
    quantization, plan = _recognized(saved, facts) if saved else (None, None)
    modules = tuple(modules_in_folder(tensors, facts, plan))
    parameters, why = (facts.parameters, "") if facts.known else (None, facts.why_unknown)
    if parameters is None and tensors and saved is None:
        parameters = sum(tensor.numbers for tensor in tensors.values())
    elif not tensors and pickles:
        why = "the weights are pickled, and are not read"
    return ModelPart(
        architecture=", ".join(map(str, config.get("architectures") or ())),
        model_type=str(config.get("model_type", "")),
        parameters=parameters,
        why=why,
        layers=facts.layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        tied_embeddings=facts.tied_embeddings,
        dtypes=_bytes_by_dtype(tensors),
        modules=modules,
        quantization=quantization,
        pickles=pickles if not tensors else (),
    )


def _facts(source: BaseModelSource, config: Mapping[str, Any]) -> ModelFacts:
    """Of a model that is no causal language model, nothing: its tensors tell what they can."""
    try:
        check_causal_lm(config, source.name)
    except ModelError as error:
        return ModelFacts(source.name, str(config.get("model_type", "")), why_unknown=error.why)
    return model_facts(source)


def _gguf_part(source: BaseModelSource) -> ModelPart:
    assert source.path is not None
    header, tensors = gguf_of(source.path)
    facts = model_facts(source)
    return ModelPart(
        architecture=header.architecture,
        model_type=facts.model_type or header.architecture,
        parameters=header.parameters,
        why="",
        layers=facts.layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        tied_embeddings=facts.tied_embeddings,
        dtypes=_bytes_by_dtype(tensors),
        modules=tuple(modules_in_gguf(tensors)),
    )


def _recognized(saved: Mapping[str, Any], facts: ModelFacts) -> tuple[Quantization, BitPlan | None]:
    method = str(saved["quant_method"])
    reader = reader_of(method)
    if reader is None:
        return Quantization(method, saved, unread="no installed plugin reads it"), None
    owner = registry().find("quantizer", reader).whose
    hooks = RunHooks()
    try:
        hooks.add(registry().create("quantizer", reader), reader)
        options, bits = PlanningHooks(hooks).quantizer(reader).quantizer_recognize(saved=saved, model=facts)
    except (PluginError, HyperionError) as error:
        return Quantization(method, saved, reader, owner, unread=f"{error.what}: {error.why}"), None
    return Quantization(method, saved, reader, owner, dict(options)), bits


def _planned_bits(path: Path) -> dict[int, int] | None:
    """How many modules have how many bits."""
    if not path.is_file():
        return None
    from ..quantization.bit_plan_file import read_bit_plan

    counts = Counter(bits for bits, _ in read_bit_plan(path, None).overrides.values())
    return dict(sorted(counts.items()))


def _bytes_by_dtype(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes.most_common())


def _by_kind(modules: tuple[ModuleBits, ...]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for module in modules:
        sizes[f"{module.kind} weights"] += module.nbytes
    return dict(sizes.most_common())


def _bytes_by_part(folder: Path, model: ModelPart | None, adapter: AdapterPart | None) -> dict[str, int]:
    """All that lies in the folder: weights by kind of module, adapter, tokenizer, checkpoints of the run, the rest."""
    sizes: Counter[str] = Counter(_by_kind(model.modules) if model else {})
    sizes["adapter"] = adapter.nbytes if adapter else 0
    counted = sum(sizes.values())
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        relative = path.relative_to(folder)
        if relative.parts[0].startswith("checkpoint-"):
            sizes["checkpoints"] += path.stat().st_size
        elif relative.name.startswith(_TOKENIZER) or relative.suffix in (".model", ".spm", ".tiktoken"):
            sizes["tokenizer"] += path.stat().st_size
        else:
            sizes["other files"] += path.stat().st_size
    sizes["other files"] -= counted  # what the weights take of their files: headers stay
    return {part: size for part, size in sizes.items() if size}
