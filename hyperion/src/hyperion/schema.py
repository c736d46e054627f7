"""The JSON Schema of a config, with the options of every plugin that is installed and sound."""

from __future__ import annotations

import logging
from typing import Any

from hyperion_core.errors import PluginError
from hyperion_core.registry import registry

from .config import FinetuneConfig

log = logging.getLogger("hyperion")
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `FinetuneConfig` as YAML writes it.

    A plugin that cannot be loaded is left out, with a warning.
    """
    schema = FinetuneConfig.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    properties = schema["properties"]
    properties["adapter"] = _one_of("adapter", "type", definitions)
    properties["objective"] = _one_of("objective", "type", definitions)
    properties["quantization"] = _one_of("quantizer", "method", definitions)
    properties["dataset"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/DatasetConfig"}]}
    properties["plugins"]["items"] = {"enum": _names("observer")} if _names("observer") else {"type": "string"}
    definitions["TrainingConfig"]["properties"]["lr_scheduler"] = _one_of("scheduler", "type", definitions)
    for replaced in ("AdapterConfig", "PluginConfig", "QuantizationConfig"):
        definitions.pop(replaced, None)
    return {"$schema": _DRAFT, "title": "Hyperion config", **{k: v for k, v in schema.items() if k != "title"}}


def _names(kind: str) -> list[str]:
    return sorted({entry.name for entry in registry().entries(kind)})


def _one_of(kind: str, key: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """A choice among the installed plugins of a kind: by name alone, or a mapping that names it in `key`."""
    options: list[dict[str, Any]] = []
    for name in _names(kind):
        try:
            model = registry().load(kind, name).config_class
        except PluginError as error:
            log.warning("left out of the schema: %s", error)
            continue
        own = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        own["properties"] = {**own["properties"], key: {"const": name}}
        own["required"] = sorted({*own.get("required", []), key})
        definitions[f"{kind}:{name}"] = own
        options.append({"$ref": f"#/$defs/{kind}:{name}"})
    return (
        {"anyOf": [{"enum": _names(kind)}, *options]}
        if options
        else {"not": {}, "description": f"no {kind} is installed"}
    )
