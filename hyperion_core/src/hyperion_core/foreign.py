"""Fields of a config class of another library, read from its installed source without importing it.

Importing peft takes seconds and transformers' arguments need torch; reading one file takes milliseconds, and the
fields are those of the version that is installed, not of the one we knew.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from .config import StrictModel
from .errors import PluginRequirementError

_KNOWN_NAMES: dict[str, Any] = {
    name: getattr(typing, name) for name in ("Any", "Optional", "Union", "Literal", "List", "Dict", "Tuple")
} | {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "tuple": tuple, "None": None}


@dataclass(frozen=True, slots=True)
class ForeignField:
    """One annotated field. `annotation` is `Any` where it uses names that only the library knows."""

    name: str
    annotation: Any
    default: str | None
    help: str


@functools.cache
def foreign_fields(package: str, file: str, class_name: str) -> dict[str, ForeignField]:
    """The dataclass fields that `class_name` declares in `file` (relative to the package's folder).

    Raises:
        PluginRequirementError: the package is not installed, or has no such class.
    """
    body = _class_body(package, file, class_name)
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            arguments = _field_arguments(node.value)
            if ast.unparse(arguments.get("init", ast.Constant(True))) == "False":
                continue
            name = node.target.id
            fields[name] = ForeignField(
                name, _annotation(node.annotation), _default(node.value, arguments), _help(arguments)
            )
    return fields


@functools.cache
def foreign_values(package: str, file: str, class_name: str) -> tuple[str, ...]:
    """The string values of an enum, in its order.

    Raises:
        PluginRequirementError: the package is not installed, or has no such class.
    """
    return tuple(
        node.value.value
        for node in _class_body(package, file, class_name)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


@functools.cache
def foreign_keys(package: str, file: str, name: str) -> tuple[str, ...]:
    """The string keys of a dict that stands at module level, in its order.

    Raises:
        PluginRequirementError: the package is not installed, or has no such dict.
    """
    for node in _module(package, file).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and ast.unparse(node.targets[0]) == name:
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    raise _other_version(package, file, name)


def with_foreign_fields(
    package: str, file: str, class_name: str, *, leave_out: typing.Collection[str] = ()
) -> typing.Callable[[type[StrictModel]], Any]:
    """Class decorator: adds the fields of a foreign class that the model does not declare itself.

    They default to None, which means "not set": pass on only `model.given()`.
    """

    def extend(model: type[StrictModel]) -> Any:
        added: dict[str, Any] = {}
        for field in foreign_fields(package, file, class_name).values():
            if field.name in leave_out or field.name in model.model_fields:
                continue
            annotation = field.annotation if field.annotation is Any else typing.Optional[field.annotation]  # noqa: UP045 - any value
            added[field.name] = (annotation, Field(None, description=field.help or None))
        created = create_model(model.__name__, __base__=model, __module__=model.__module__, **added)
        created.__doc__ = model.__doc__
        created.__qualname__ = model.__qualname__
        return created

    return extend


def _class_body(package: str, file: str, class_name: str) -> list[ast.stmt]:
    for node in _module(package, file).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node.body
    raise _other_version(package, file, class_name)


@functools.cache
def _module(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PluginRequirementError(f"{package} is not installed", fix=f"python -m pip install {package}")
    try:
        return ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    except OSError as error:
        raise _other_version(package, file, "") from error


def _other_version(package: str, file: str, name: str) -> PluginRequirementError:
    return PluginRequirementError(
        f"the installed {package} has no {name + ' in ' if name else ''}{file}",
        why="this version of the library is not one that Hyperion was tested with",
        fix=f"install the version in constraints.txt: python -m pip install -c constraints.txt {package}",
    )


def _field_arguments(value: ast.expr | None) -> dict[str, ast.expr]:
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
    return {}


def _default(value: ast.expr | None, arguments: dict[str, ast.expr]) -> str | None:
    chosen = arguments.get("default", arguments.get("default_factory")) if arguments else value
    return ast.unparse(chosen) if chosen is not None else None


def _help(arguments: dict[str, ast.expr]) -> str:
    metadata = arguments.get("metadata")
    try:
        return " ".join(str(ast.literal_eval(metadata)["help"]).split()) if metadata else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _annotation(node: ast.expr) -> Any:
    """The annotation as a type, built from the few names a config uses: nothing of the library is evaluated.

    A part that uses other names (an enum, say) becomes `Any`.
    """
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            try:
                return _annotation(ast.parse(node.value, mode="eval").body)
            except SyntaxError:
                return Any
        return node.value
    if isinstance(node, ast.Name):
        return _KNOWN_NAMES.get(node.id, Any)
    if isinstance(node, ast.Attribute):
        return _KNOWN_NAMES.get(node.attr, Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[_annotation(node.left), _annotation(node.right)]  # noqa: UP007 - any two values
    if isinstance(node, ast.Subscript):
        origin = _annotation(node.value)
        arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if origin is Any:
            return Any
        if origin is typing.Literal:
            try:
                return typing.Literal[tuple(ast.literal_eval(argument) for argument in arguments)]
            except ValueError:
                return Any
        inner = tuple(_annotation(argument) for argument in arguments)
        try:
            return origin[inner if len(inner) > 1 else inner[0]]
        except TypeError:
            return Any
    return Any
