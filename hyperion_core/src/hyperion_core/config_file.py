"""A config file as plain data that remembers its lines, so that an error can say file:line.

YAML by `SafeLoader`; JSON is read as the YAML that it is. Duplicate keys are refused, and so is a document that
unfolds into more than it says (aliases of aliases).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, Problem
from .suggest import closest

_MOST_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number, as everybody who writes it means it."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a date in month 99, a number of 5000 digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _string(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """JSON writes an emoji as two escapes, which YAML reads as two halves of a character."""
    text = str(loader.construct_scalar(node))
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


_Loader.add_constructor("tag:yaml.org,2002:str", _string)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """`data` as the file gives it; `lines` maps dotted paths ("adapter.r") to line numbers from 1."""

    path: Path
    data: dict[str, Any]
    lines: dict[str, int]

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """The same problems, each with file:line, in the order of the file."""
        placed = [(self._line(problem.path), problem) for problem in problems]
        placed.sort(key=lambda pair: pair[0])
        return [replace(problem, source=f"{self.path}:{line}") for line, problem in placed]

    def _line(self, path: str) -> int:
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path, 1)


def read_config_file(path: str | Path) -> ConfigFile:
    """Read one YAML or JSON mapping.

    Raises:
        ConfigError: not there, not readable, not UTF-8, not YAML, no mapping, a key twice.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix == ".json":
        text = text.replace("\t", "  ")  # YAML takes no tabs in indentation, JSON does
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise _refused(
                path, 1, "the file is empty", "a config is a mapping of keys to values", "start with: base_model: …"
            )
        if not isinstance(node, yaml.MappingNode):
            raise _refused(path, 1, "the file holds no mapping of keys to values", "", "start with: base_model: …")
        lines: dict[str, int] = {}
        _walk(node, "", lines, path, [0], ())
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise _refused(
            path, line, "the file is not valid YAML", why, "check indentation, quotes and values near this line"
        ) from error
    except RecursionError as error:
        raise _refused(path, 1, "the file is nested too deep", "", "a config has a handful of levels") from error
    finally:
        if loader is not None:
            loader.dispose()
    return ConfigFile(path, data, lines)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent if path.parent.is_dir() else None
        near = closest(path.name, [p.name for p in folder.iterdir()]) if folder else None
        fix = f"did you mean {path.with_name(near)}?" if near else "give the path of a YAML or JSON file"
        raise ConfigError(
            [Problem("", "there is no such file", fix=fix, source=str(path))], source=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise _refused(path, 1, "the file is not UTF-8 text", str(error), "save it as UTF-8") from error
    except OSError as error:
        raise _refused(
            path, 1, "the file cannot be read", error.strerror or str(error), "give a readable file"
        ) from error


def _walk(
    node: yaml.Node, at: str, lines: dict[str, int], path: Path, count: list[int], above: tuple[int, ...]
) -> None:
    count[0] += 1
    if count[0] > _MOST_NODES or id(node) in above:
        raise _refused(path, node.start_mark.line + 1, "the file unfolds without end", "aliases that repeat aliases",
                       "write the values out")  # fmt: skip
    above = (*above, id(node))
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(path, line, "a key is not a word", "keys are plain words", "quote it")
            if key.tag != "tag:yaml.org,2002:str":
                raise _refused(
                    path, line, f"the key {key.value} is not a word", "YAML reads it as something else", "quote it"
                )
            if key.value in seen:
                raise _refused(path, line, f'the key "{key.value}" stands twice', "only one could count", "remove one")
            seen.add(key.value)
            below = f"{at}.{key.value}" if at else key.value
            lines[below] = line
            _walk(value, below, lines, path, count, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, f"{at}.{index}", lines, path, count, above)


def _refused(path: Path, line: int, what: str, why: str, fix: str) -> ConfigError:
    return ConfigError([Problem("", what, why, fix, f"{path}:{line}")], source=str(path))
