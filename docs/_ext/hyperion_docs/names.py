"""The reference of public Python names: what users import, and what plugin authors do."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from hyperion_core.config import StrictModel

from .markdown import code, prose

# Modules of the core that plugin authors import from, in the order in which one meets them.
CORE_MODULES = (
    "hyperion_core.kinds",
    "hyperion_core.config",
    "hyperion_core.facts",
    "hyperion_core.context",
    "hyperion_core.errors",
    "hyperion_core.registry",
    "hyperion_core.plan",
    "hyperion_core.artifact",
    "hyperion_core.language_model",
    "hyperion_core.suggest",
    "hyperion_core.live_facts",
    "hyperion_core.unpacked_weight",
    "hyperion_core.foreign",
    "hyperion_core.quiet",
)

# What users import from other modules of the framework.
ELSEWHERE = (
    "hyperion.models.load_tuned",
    "hyperion.models.load_standalone",
    "hyperion.optimization.AdapterOptimizer",
)


def framework_names() -> dict[str, Any]:
    """Everything that `from hyperion… import` gives, by its dotted name."""
    import hyperion
    import hyperion.data

    names = {f"hyperion.{name}": getattr(hyperion, name) for name in dir(hyperion) if not name.startswith("_")}
    names |= {f"hyperion.data.{name}": getattr(hyperion.data, name) for name in hyperion.data.__all__}
    return names | {
        name: getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in ELSEWHERE
    }


def core_names(module: str) -> dict[str, Any]:
    """The public classes and functions that one module of the core defines."""
    found = vars(importlib.import_module(module))
    return {
        f"{module}.{name}": value
        for name, value in found.items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)))
        and value.__module__ == module
    }


def everything() -> dict[str, Any]:
    """All names of the reference."""
    names = framework_names()
    for module in CORE_MODULES:
        names |= core_names(module)
    return names


def render() -> str:
    parts = ["## For users"]
    for name, value in framework_names().items():
        parts += _entry(name, value)
    parts.append("## For plugin authors")
    for module in CORE_MODULES:
        parts += [f"### {module}", prose(importlib.import_module(module).__doc__)]
        for name, value in core_names(module).items():
            parts += _entry(name, value, level=4)
    return "\n\n".join(part for part in parts if part)


def _entry(name: str, value: Any, level: int = 3) -> Iterator[str]:
    yield f"{'#' * level} {name}"
    if signature := _signature(name.rpartition(".")[2], value):
        yield f"```python\n{signature}\n```"
    yield prose(value.__doc__ if not _is_generated(value) else "")
    if dataclasses.is_dataclass(value):
        yield "Fields: " + ", ".join(code(f"{field.name}: {field.type}") for field in dataclasses.fields(value)) + "."
    if not inspect.isclass(value) or issubclass(value, (StrictModel, BaseException)):
        return
    for own, method in vars(value).items():
        function = method.__func__ if isinstance(method, classmethod) else method
        if inspect.isfunction(function) and not own.startswith("_") and function.__doc__:
            yield f"```python\n{_signature(f'{value.__name__}.{own}', function)}\n```"
            yield prose(function.__doc__)


def _is_generated(value: Any) -> bool:
    """dataclasses write the signature where a class has no docstring."""
    return dataclasses.is_dataclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and (
        issubclass(value, (StrictModel, BaseException, enum.Enum)) or dataclasses.is_dataclass(value)
    ):
        return ""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    returns = (
        ""
        if inspect.isclass(value) or signature.return_annotation is signature.empty
        else f" -> {signature.return_annotation}"
    )
    arguments = list(_arguments(parameters))
    if inspect.isclass(value) and (not arguments or arguments == ["*args", "**kwargs"]):
        return ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= 96:
        return line
    inside = "\n".join(f"    {argument}," for argument in arguments)
    return f"{name}(\n{inside}\n){returns}"


def _arguments(parameters: list[inspect.Parameter]) -> Iterator[str]:
    starred = False
    for each in parameters:
        starred = starred or each.kind is each.VAR_POSITIONAL
        if each.kind is each.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        annotation = "" if each.annotation is each.empty else f": {each.annotation}"
        default = "" if each.default is each.empty else f" = {each.default!r}"
        yield f"{star}{each.name}{annotation}{default}"
