"""The reference of config keys, from the models that read the config, and from those of every installed plugin."""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hyperion_core.config import CalibrationConfig, PluginConfig, QuantizationConfig, StrictModel
from hyperion_core.distributions import PluginEntry
from hyperion_core.kinds import Plugin, with_article
from hyperion_core.registry import registry
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .markdown import code, prose, sentence, table

# Kinds whose plugins have options in a config, with the key under which they stand.
_PLACES = {
    "adapter": "adapter",
    "quantizer": "quantization",
    "objective": "objective",
    "scheduler": "training.lr_scheduler",
}


@dataclass(frozen=True)
class Section:
    """One mapping of the config: `path` is "" for the whole file."""

    title: str
    path: str
    model: type[StrictModel]
    intro: str = ""


@dataclass(frozen=True)
class Key:
    """One row of the reference."""

    name: str
    type: str
    default: str
    description: str


def sections() -> list[Section]:
    """Every mapping that a config may hold, with the options of every plugin that is installed."""
    from hyperion.config import DatasetConfig, FinetuneConfig
    from hyperion.training_config import TrainingConfig

    found = [
        Section("The whole file", "", FinetuneConfig),
        Section("`dataset`", "dataset", DatasetConfig),
        *_further(FinetuneConfig),
        Section("`training`", "training", TrainingConfig),
    ]
    for kind, place in _PLACES.items():
        for entry in registry().entries(kind):
            model = _class_of(entry).config_class
            choice = "method" if kind == "quantizer" else "type"
            title = f"`{place}`: {with_article(kind)} with `{choice}: {entry.name}`"
            found.append(Section(title, place, model, f"From `{entry.distribution}`."))
    intro = "Of the model that a quantizer measures on, and of the bits that `bits: auto` shares out."
    found.append(Section("`quantization.calibration`", "quantization.calibration", CalibrationConfig, intro))
    return found


def keys(model: type[StrictModel]) -> list[Key]:
    """Of one mapping, in the order of its model."""
    return [
        Key(field.alias or name, _type(field), _default(field), sentence(_description(name, field)))
        for name, field in model.model_fields.items()
    ]


def refused() -> Mapping[str, tuple[str, str]]:
    """Fields of transformers' arguments that `training:` refuses: (why, fix) by name."""
    from hyperion.refused_arguments import REFUSED

    return REFUSED


def render() -> str:
    parts = []
    for section in sections():
        rows = [(code(key.name), key.type, key.default, key.description) for key in keys(section.model)]
        parts += [f"## {section.title}", section.intro, prose((section.model.__doc__ or "").partition("\n\n")[0])]
        parts.append(table(("key", "type", "default", "meaning"), rows))
    why = [(code(name), sentence(f"{reason}."), sentence(f"{fix}.")) for name, (reason, fix) in refused().items()]
    parts += ["## `training`: what is refused", table(("key", "why", "what to do"), why)]
    return "\n\n".join(part for part in parts if part)


def _class_of(entry: PluginEntry) -> type[Plugin]:
    """As a run loads it, but for what it requires: the site is built where torch is not."""
    module, _, name = entry.value.partition(":")
    found: type[Plugin] = getattr(importlib.import_module(module), name)
    return found


def _further(model: type[StrictModel]) -> list[Section]:
    """Mappings of the config that were added to the model: nobody has to list them here."""
    known = {"adapter", "dataset", "objective", "quantization", "training"}
    found = []
    for name, field in model.model_fields.items():
        for each in (field.annotation, *typing.get_args(field.annotation)):
            if name not in known and isinstance(each, type) and issubclass(each, StrictModel):
                found.append(Section(f"`{name}`", name, each))
    return found


def _description(name: str, field: FieldInfo) -> str:
    for key, model in (("type", PluginConfig), ("method", QuantizationConfig)):
        if name == key and not field.description:  # a plugin's own default: what it means is said once
            return model.model_fields[key].description or ""
    return field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined and field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    if isinstance(value, StrictModel):
        return "see below"
    if value is None or value == []:
        return ""
    return code({True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value))


def _type(field: FieldInfo) -> str:
    return _named(field.annotation, field)


def _named(annotation: Any, field: FieldInfo | None = None) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _named(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        parts = [_named(each) for each in typing.get_args(annotation) if each is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is typing.Literal:
        return " or ".join(code(str(value)) for value in typing.get_args(annotation))
    if origin is list:
        return f"list of {_named(typing.get_args(annotation)[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return "mapping"
    known = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}
    return known.get(annotation, getattr(annotation, "__name__", str(annotation)))
