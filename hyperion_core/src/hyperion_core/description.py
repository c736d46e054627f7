"""What a plugin is, as plain data: its hooks and options from its class, the rest from its distribution's metadata."""

from __future__ import annotations

import importlib.metadata
import inspect
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from email.message import Message
from pathlib import PurePath
from typing import Any, cast

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion
from pydantic.fields import FieldInfo

from . import specs
from .config import QuantizationConfig, StrictModel
from .distributions import PluginEntry
from .errors import ConfigError
from .kinds import Plugin, kind_named


@dataclass(frozen=True, slots=True)
class HookFact:
    """One hook of the plugin's kind. `doc`: the first sentence of its specification."""

    name: str
    required: bool
    implemented: bool
    doc: str


@dataclass(frozen=True, slots=True)
class OptionFact:
    """One config option. `default` is plain data; None may be the default, or none, which `required` tells apart."""

    name: str
    type: str
    required: bool
    default: Any
    description: str


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """What a plugin's class says.

    declares: its `capabilities` or `provides`, as plain data.
    example: a config of it: its name, and its defaults where they can stand together.
    needs: what is wrong with a config that only names it, as sentences: what the user has to add.
    """

    summary: str
    hooks: tuple[HookFact, ...]
    config_class: str
    options: tuple[OptionFact, ...]
    declares: dict[str, Any]
    example: dict[str, Any]
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequirementFact:
    """What a distribution asks for. `name`: whose; `installed`: a version, "" where there is none."""

    name: str
    requirement: str
    installed: str
    fits: bool


@dataclass(frozen=True, slots=True)
class DistributionFacts:
    """What a distribution's metadata says; "" where it says nothing."""

    summary: str
    licence: str
    homepage: str
    requires_python: str
    requirements: tuple[RequirementFact, ...]


def class_facts(plugin: type[Plugin], name: str) -> ClassFacts:
    """Read from the class of the plugin called `name`; no instance is made, no hook is called."""
    model = plugin.config_class
    if not (isinstance(model, type) and issubclass(model, StrictModel)):
        model = kind_named(plugin.kind).config_class  # a broken plugin is described as far as it goes
    required = plugin.required()
    options = tuple(_option(field.alias or key, field) for key, field in model.model_fields.items())
    example, needs = _example(model, name, options)
    declared = getattr(plugin, "capabilities", None) or getattr(plugin, "provides", None)
    return ClassFacts(
        summary=_first_sentence(vars(plugin).get("__doc__")),
        hooks=tuple(
            HookFact(name, name in required, callable(getattr(plugin, name, None)), hook_summary(plugin.hooks, name))
            for name in specs.hook_names(plugin.hooks)
        ),
        config_class=f"{model.__module__}.{model.__qualname__}",
        options=options,
        declares=_plain(asdict(declared)) if is_dataclass(declared) and not isinstance(declared, type) else {},
        example=example,
        needs=needs,
    )


def facts_from(data: dict[str, Any]) -> ClassFacts:
    """Inverse of `dataclasses.asdict`."""
    return ClassFacts(
        **data
        | {
            "hooks": tuple(HookFact(**hook) for hook in data["hooks"]),
            "options": tuple(OptionFact(**option) for option in data["options"]),
            "needs": tuple(data["needs"]),
        }
    )


def hook_summary(page: type, name: str) -> str:
    """The first sentence of a hook's specification that says what it is for."""
    text = " ".join((inspect.getdoc(vars(page)[name]) or "").split("\n\n")[0].split()).removeprefix("★").strip()
    head, _, rest = text.partition(". ")
    return _first_sentence(rest if head.startswith("Torch-free") and rest else text)


def distribution_facts(entry: PluginEntry) -> DistributionFacts:
    """From the metadata of the very distribution that the entry belongs to. Imports nothing."""
    distribution = getattr(entry.entry_point, "dist", None)
    if distribution is None:
        return DistributionFacts("", "", "", "", ())
    metadata = cast(Message, distribution.metadata)
    return DistributionFacts(
        summary=metadata.get("Summary") or "",
        licence=metadata.get("License-Expression") or _licence(metadata),
        homepage=_homepage(metadata),
        requires_python=metadata.get("Requires-Python") or "",
        requirements=tuple(requirement_facts(distribution)),
    )


def requirement_facts(distribution: importlib.metadata.Distribution) -> list[RequirementFact]:
    """What a distribution asks for on this machine, extras left out, and what there is of it."""
    found = []
    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            found.append(RequirementFact("", text, "", False))
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(_requirement_fact(requirement))
    return found


def _requirement_fact(requirement: Requirement) -> RequirementFact:
    name = canonicalize_name(requirement.name)
    try:
        installed = importlib.metadata.version(name)
        fits = requirement.specifier.contains(installed, prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        installed, fits = "", False
    except (InvalidVersion, KeyError, TypeError, UnicodeDecodeError):  # what a broken installation leaves behind
        installed, fits = "an unreadable one", False
    return RequirementFact(name, str(requirement), installed, fits)


def _example(
    model: type[StrictModel], name: str, options: tuple[OptionFact, ...]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    bare = {"method" if issubclass(model, QuantizationConfig) else "type": name}
    whole = bare | {each.name: each.default for each in options if each.default is not None and each.name not in bare}
    needs: tuple[str, ...] = ()
    for example in (whole, bare):
        try:
            model.parse(example)
        except ConfigError as error:
            needs = tuple(": ".join(filter(None, (each.what, each.fix))) for each in error.problems)
        else:
            return example, ()
    return bare, needs


def _option(name: str, field: FieldInfo) -> OptionFact:
    default = None
    if field.default_factory is None:
        default = None if field.is_required() else field.default
    elif not field.default_factory_takes_validated_data:
        default = field.get_default(call_default_factory=True)
    description = " ".join((field.description or "").split())
    return OptionFact(name, type_text(field.annotation), field.is_required(), _plain(default), description)


def type_text(annotation: Any) -> str:
    """A type as a reader writes it: `int | None`, `list[str]`, `"none" | "all"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(argument) for argument in arguments))
    if origin is typing.Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if annotation is None or annotation is type(None):
        return "None"
    if origin is not None and arguments:
        return f"{type_text(origin)}[{', '.join(type_text(argument) for argument in arguments)}]"
    return str(getattr(annotation, "__name__", annotation))


def _plain(value: Any) -> Any:
    """As JSON can hold it, in an order of its own."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return str(value)


def _first_sentence(text: str | None) -> str:
    whole = " ".join((text or "").split("\n\n")[0].split())
    head, stop, _ = whole.partition(". ")
    return head + "." if stop else whole


def _licence(metadata: Message) -> str:
    """Older metadata holds the whole text in License, or says it in classifiers alone."""
    lines = (metadata.get("License") or "").strip().splitlines()
    if len(lines) == 1:
        return str(lines[0])
    named = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License :: ")]
    return str(named[0].rpartition(" :: ")[2]) if named else ""


def _homepage(metadata: Message) -> str:
    links = [line.partition(",") for line in metadata.get_all("Project-URL") or []]
    by_label = {label.strip().lower(): url.strip() for label, _, url in links}
    for label in ("homepage", "home", "source", "source code", "repository", "documentation"):
        if label in by_label:
            return by_label[label]
    return metadata.get("Home-page") or next(iter(by_label.values()), "")
