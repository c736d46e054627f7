"""A config file as plain data that remembers its lines, so that an error can say file:line.

JSON is read as the YAML that it is. Values are read as YAML 1.2 has them: `no` is a word, `0100` is a hundred,
`12:30` and `2026-01-31` are text, and 2e-4 is a number. Duplicate keys are refused, and so is what would take long:
a file that is too large, is nested too deep, or unfolds into more than it says (aliases of aliases).
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

_MOST_BYTES = 1_000_000
_MOST_NODES = 50_000
_DEEPEST = 20
_LONGEST_KEY = 200
_LONGEST_NUMBER = 400
_TOO_MUCH = (
    "the file holds too much",
    f"it has more than {_MOST_NODES:,} values, counting what aliases repeat, and a config has a hundred",
    "was this the data? name it under dataset:",
)
_CORE = "tag:yaml.org,2002:"


class _Bounded(Exception):
    """Reading would take long. `args` are line, what, why and fix."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the values of YAML 1.2, and 2e-4 as the number that everybody means by it."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.depth > _DEEPEST:
            why = f"a config has a handful of levels, and this is level {_DEEPEST + 1}"
            raise _Bounded(line, "the file is nested too deep", why, "close the brackets")
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            raise _Bounded(line, *_TOO_MUCH)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


# Built anew: SafeLoader's own are those of YAML 1.1, where no is false, 0100 is 64 and 1:30 is ninety.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
              r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("int", r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)", "-+0123456789"),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):  # fmt: skip
    _Loader.add_implicit_resolver(_CORE + _tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _string(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """JSON writes an emoji as two escapes, which YAML reads as two halves of a character."""
    text = str(loader.construct_scalar(node))
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    digits = text.lstrip("+-")
    base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
    return int(text, base)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return float(re.sub(r"\.(inf|nan)$", r"\1", text))


def _unknown(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} is none of a config's", node.start_mark)


_Loader.yaml_constructors = {
    _CORE + tag: yaml.SafeLoader.yaml_constructors[_CORE + tag] for tag in ("null", "bool", "seq", "map")
}
_Loader.add_constructor(_CORE + "str", _string)
_Loader.add_constructor(_CORE + "int", _whole_number)
_Loader.add_constructor(_CORE + "float", _number)
_Loader.add_constructor(None, _unknown)


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
        ConfigError: not there, not readable, too large, not UTF-8, not YAML, no mapping, a key twice.
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
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            why = f"a config is keys with values, and this is {kind}"
            raise _refused(path, 1, "the file holds no mapping of keys to values", why, "start with: base_model: …")
        lines: dict[str, int] = {}
        _walk(node, "", lines, path, [0], ())
        data = loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: PyYAML's own, of a version of YAML with 5000 digits
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        language = "JSON" if path.suffix == ".json" else "YAML"
        fix = "indent with spaces" if r"'\t'" in why else "check indentation, quotes and values near this line"
        raise _refused(path, line, f"the file is not valid {language}", why, fix) from error
    except _Bounded as error:
        raise _refused(path, *error.args) from error
    finally:
        if loader is not None:
            loader.dispose()
    return ConfigFile(path, data, lines)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except IsADirectoryError as error:
        inside = sorted(path.glob("*.yaml"))
        fix = f"name a file in it: {inside[0]}" if inside else "give the path of a YAML or JSON file"
        raise _refused(path, 0, "the file cannot be read", "it is a folder", fix) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        why = getattr(error, "strerror", None) or str(error)
        raise _refused(path, 0, "the file cannot be read", why, "give a readable file") from error
    if len(content) > _MOST_BYTES:
        why = f"it has more than {_MOST_BYTES:,} bytes, and a config has a few thousand"
        raise _refused(path, 0, "the file is too large for a config", why, "was this the data? name it under dataset:")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _refused(path, 1, "the file is not UTF-8 text", "it is UTF-16", "save it as UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        why = f"byte {content[error.start]:#04x} at position {error.start} begins no character"
        raise _refused(path, line, "the file is not UTF-8 text", why, "save it as UTF-8") from error


def _missing(path: Path) -> ConfigError:
    try:
        near = closest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        near, why = None, f"there is no folder {path.parent}"
    else:
        why = f"the folder {path.parent.resolve()} holds no {path.name}"
    fix = f"did you mean {path.with_name(near)}?" if near else "give the path of a YAML or JSON file"
    return _refused(path, 0, "there is no such file", why, fix)


def _walk(
    node: yaml.Node, at: str, lines: dict[str, int], path: Path, count: list[int], above: tuple[int, ...]
) -> None:
    count[0] += 1
    if id(node) in above:
        what = "the file unfolds without end"
        raise _refused(path, node.start_mark.line + 1, what, "an alias stands inside what it names", "write it out")
    if count[0] > _MOST_NODES:
        raise _refused(path, node.start_mark.line + 1, *_TOO_MUCH)
    above = (*above, id(node))
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(path, line, "a key is not a word", "keys are plain words", "quote it")
            if key.tag == _CORE + "merge":
                raise _refused(path, line, "<< is not read", "a config says each thing once, where it stands",
                               "write the keys out")  # fmt: skip
            if len(key.value) > _LONGEST_KEY:
                raise _refused(path, line, f"the key {key.value[:20]}… is too long",
                               f"no key has more than {_LONGEST_KEY} characters",
                               "is a quote or a colon in the wrong place?")  # fmt: skip
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
    """`line` 0 is the file as a whole."""
    return ConfigError([Problem("", what, why, fix, f"{path}:{line}" if line else str(path))], source=str(path))
