"""Which modules an adapter touches, by PEFT's own rules, from facts alone: no torch, no peft import.

The rules are those of `check_target_module_exists` and `_set_trainable` in peft.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperion_core.errors import CompatibilityError, Problem
from hyperion_core.facts import ModelFacts, ModuleFact
from hyperion_core.suggest import closest

ALL_LINEAR = "all-linear"
# Keys that hold regular expressions, and what PEFT makes of one. A list of targets holds plain names.
_EXPRESSIONS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "feedforward_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_LISTS_OF_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True, slots=True)
class Selection:
    """How a config names its modules, in PEFT's terms."""

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def matches(self, name: str) -> bool:
        """Whether PEFT would wrap the module of this name; "all-linear" is a kind, not a name: see `select`."""
        if self.excludes(name):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True
        return _ends_with_one(name, self.target_modules) and self.in_chosen_layer(name)

    def excludes(self, name: str) -> bool:
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if re.fullmatch(excluded, name):
                return True
        elif excluded and (name in excluded or _ends_with_one(name, excluded)):
            return True
        return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.modules_to_save or ())

    def in_chosen_layer(self, name: str) -> bool:
        chosen = self.layers_to_transform
        if chosen is None or (not isinstance(chosen, int) and not chosen):
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else list(self.layers_pattern or [])
        if patterns:
            found = next(
                (m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", name)) is not None), None
            )
        else:
            found = _FIRST_INDEX.match(name)
        if found is None:
            return False
        index = int(found["idx"])
        return index == chosen if isinstance(chosen, int) else index in chosen


def select(selection: Selection, facts: ModelFacts, kinds: Iterable[str]) -> list[ModuleFact]:
    """The modules that `selection` means on a known model, in the model's order.

    Args:
        kinds: kinds of modules that the method can wrap.

    Raises:
        CompatibilityError: none matches, a name matches nothing, or one matches what the method cannot wrap.
    """
    problems = selection_problems(selection, facts, kinds)
    if problems:
        first = problems[0]
        raise CompatibilityError(first.what, why=first.why, fix=first.fix)
    return _chosen(selection, facts)


def selection_problems(selection: Selection, facts: ModelFacts, kinds: Iterable[str]) -> list[Problem]:
    """Everything that stands against `selection` on a known model; paths are keys of the config."""
    problems = [*_dead_names(selection, facts), *_saved_problems(selection, facts)]
    if problems:
        return problems
    allowed = set(kinds)
    chosen = _chosen(selection, facts)
    if not chosen:
        return [
            Problem(
                "target_modules",
                f"target_modules {_shown(selection.target_modules)} matches no module of {facts.source}",
                "every module that it names is left out by exclude_modules, layers_to_transform or modules_to_save"
                if _chosen(Selection(selection.target_modules), facts)
                else f"its modules are called {_names(facts, allowed)}",
                f"name some of: {_names(facts, allowed)}",
            )
        ]
    wrong = [module.name for module in chosen if module.kind not in allowed]
    if isinstance(selection.target_modules, str) and selection.target_modules != ALL_LINEAR:
        wrong += [name for name in _containers(facts) if selection.matches(name)]
    if wrong:
        return [
            Problem(
                "target_modules",
                f"target_modules {_shown(selection.target_modules)} matches modules that this adapter cannot wrap",
                f"{', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}: only "
                f"{' and '.join(sorted(allowed))} modules can be",
                f"name only some of: {_names(facts, allowed)}",
            )
        ]
    return []


def pattern_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Values of a config, as the user gave them, that should be regular expressions and are none."""
    found = []
    for key, form in _EXPRESSIONS.items():
        value = data.get(key)
        if not value or (not isinstance(value, str) and key in _LISTS_OF_NAMES):
            continue
        given = [value] if isinstance(value, str) else value if isinstance(value, (list, Mapping)) else []
        for pattern in (each for each in given if isinstance(each, str)):
            try:
                re.compile(form.replace("{}", pattern))
            except (re.error, OverflowError, RecursionError) as error:
                what = f"{pattern!r} is no regular expression"
                found.append(Problem(key, what, str(error), "correct it; a list of plain names needs none"))
    return found


def saved_modules(names: Sequence[str] | None, facts: ModelFacts) -> list[ModuleFact]:
    """The modules with weights that `modules_to_save` trains in full."""
    return [m for m in facts.modules if any(_below(m.name, name) for name in names or ())]


def saved_paths(names: Sequence[str] | None, facts: ModelFacts) -> list[str]:
    """Full names of what `modules_to_save` names, containers too. PEFT is given these: by a mere ending it would also
    take "input_layernorm" for "norm"."""
    if not names:
        return []
    every = [*(module.name for module in facts.modules), *_containers(facts)]
    return [path for path in every if any(path == name or path.endswith(f".{name}") for name in names)]


def compact(names: Iterable[str], facts: ModelFacts) -> list[str]:
    """The shortest list that means exactly these modules by PEFT's rule: last parts of names where those are theirs
    alone, longer ones where they are not."""
    wanted = set(names)
    others = [m.name for m in facts.modules if m.name not in wanted] + _containers(facts)
    found: dict[str, None] = {}
    for name in (m.name for m in facts.modules if m.name in wanted):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if not any(other == suffix or other.endswith(f".{suffix}") for other in others):
                break
        found[suffix] = None
    return list(found)


@functools.cache
def peft_mapping(name: str) -> Mapping[str, Any]:
    """A table of module names by model_type, read from the installed peft's `utils/constants.py` without importing it.

    Empty when that version has no such table.
    """
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return {}
    path = Path(spec.submodule_search_locations[0], "utils", "constants.py")
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and _named(node, name):
            return dict(ast.literal_eval(node.value))
    return {}


def _named(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _chosen(selection: Selection, facts: ModelFacts) -> list[ModuleFact]:
    if selection.target_modules == ALL_LINEAR:
        return [m for m in facts.linear() if not selection.excludes(m.name) and selection.in_chosen_layer(m.name)]
    return [module for module in facts.modules if selection.matches(module.name)]


def _dead_names(selection: Selection, facts: ModelFacts) -> list[Problem]:
    """Names in a list that match no module at all: PEFT passes over them in silence as long as one matches."""
    if isinstance(selection.target_modules, str):
        return []
    every = [module.name for module in facts.modules]
    dead = [t for t in selection.target_modules if not any(n == t or n.endswith(f".{t}") for n in every)]
    if not dead:
        return []
    return [_no_such("target_modules", dead, facts, {"linear", "embedding"})]


def _saved_problems(selection: Selection, facts: ModelFacts) -> list[Problem]:
    names = selection.modules_to_save or ()
    dead = [name for name in names if not saved_modules([name], facts)]
    if dead:
        return [_no_such("modules_to_save", dead, facts, {"linear", "embedding", "norm"})]
    shared = [m.name for m in saved_modules(names, facts) if m.kind == "embedding"] if facts.tied_embeddings else []
    if shared:
        return [
            Problem(
                "modules_to_save",
                f"{', '.join(shared)} cannot be trained in full on {facts.source}",
                "the output head shares its weight, and only one of the two would be trained",
                "leave it out; to teach new tokens, use new_tokens",
            )
        ]
    return []


def _no_such(key: str, dead: Sequence[str], facts: ModelFacts, kinds: set[str]) -> Problem:
    names = [name for kind in sorted(kinds) for name in facts.short_names(kind)]
    near = {name: closest(name, names) for name in dead}
    meant = ", ".join(f'"{found}" for "{name}"' for name, found in near.items() if found)
    why = f"its modules are called {_names(facts, kinds)}"
    if facts.tied_embeddings and any(name.rpartition(".")[2] in {"lm_head", "embed_out"} for name in dead):
        why += "; its output head is no module of its own, because it shares the embedding's weight"
    return Problem(
        key,
        f"{key}: {facts.source} has no module called {', '.join(map(repr, dead))}",
        why,
        f"did you mean {meant}?" if meant else f"name some of: {_names(facts, kinds)}",
    )


def _names(facts: ModelFacts, kinds: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name for kind in ("linear", "embedding", "norm", "other") if kind in set(kinds)
                                   for name in facts.short_names(kind)))  # fmt: skip


def _containers(facts: ModelFacts) -> list[str]:
    """Names of the modules that hold others: peft looks at those too."""
    found: dict[str, None] = {}
    for module in facts.modules:
        parts = module.name.split(".")
        for length in range(1, len(parts)):
            found[".".join(parts[:length])] = None
    return list(found)


def _ends_with_one(name: str, ends: Iterable[str]) -> bool:
    return name.endswith(_endings(tuple(ends)))


# asked of each module of a model with the same names
@functools.lru_cache(maxsize=64)
def _endings(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


def _below(name: str, saved: str) -> bool:
    """Whether the module `name` is, or lies in, one that `saved` names."""
    parts = name.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(path == saved or path.endswith(f".{saved}") for path in above)


def _shown(targets: str | Sequence[str]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(list(targets))
