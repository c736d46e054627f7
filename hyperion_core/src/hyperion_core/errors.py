"""Every error that a user may meet: what went wrong, whose it is, why, and the fix.

The command line prints `str(error)` and exits with `error.exit_code`; a traceback is for bugs of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from .secrets import redacted

_MOST_SHOWN = 50


def printable(text: str) -> str:
    """The same text without secrets, and without what a terminal would obey: escapes, control and half characters.

    They come out of configs and data, where they may be an accident or a trick: "\\x1b[2J" is shown, not done.
    """
    text = redacted(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an input.

    `path` is the dotted config path ("training.learning_rate"), or "" for the whole input; `source` is
    "file:line" where the input has lines.
    """

    path: str
    what: str
    why: str = ""
    fix: str = ""
    source: str = ""

    def at(self, prefix: str) -> Problem:
        """The same problem, its path moved below `prefix`."""
        return replace(self, path=".".join(part for part in (prefix, self.path) if part))

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.source, self.path, self.what) if part)
        return "\n".join([_line(head), *_details(self.why, self.fix)])


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an examination found. A "problem" makes something fail; with a "warning" all works."""

    level: Literal["problem", "warning"]
    what: str
    why: str = ""
    fix: str = ""

    @classmethod
    def of(cls, error: HyperionError) -> Finding:
        """The problem that an error tells of."""
        return cls("problem", error.what, error.why, error.fix)

    def __str__(self) -> str:
        return "\n".join([printable(self.what), *_details(self.why, self.fix)])


class HyperionError(Exception):
    """Base of all errors that Hyperion raises on purpose.

    Args:
        what: one sentence: what failed, and whose it is (a file, a plugin and its distribution).
        why: the cause, as far as it is known.
        fix: what the user can do now, a command where there is one.
    """

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join([printable(self.what), *_details(self.why, self.fix)])


class ConfigError(HyperionError):
    """A config is refused. `problems` holds every problem found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem], *, source: str = "the config") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        super().__init__(f"{source} has {count} problem{'' if count == 1 else 's'}")

    def __str__(self) -> str:
        shown = [_indent(str(problem)) for problem in self.problems[:_MOST_SHOWN]]
        more = len(self.problems) - len(shown)
        return "\n".join([f"{_line(self.what)}:", *shown, *([f"  … and {more} more"] if more else [])])


class PluginError(HyperionError):
    """Base of everything that can be wrong with a plugin."""


class PluginNotFoundError(PluginError):
    """No installed distribution offers a plugin of that kind and name."""


class PluginConflictError(PluginError):
    """Several distributions offer the same kind and name, and the config does not say whose it wants."""


class PluginContractError(PluginError):
    """The plugin was built for another version of the contract; found before it is imported."""


class PluginRequirementError(PluginError):
    """The plugin is installed, and something that it requires is not."""


class PluginLoadError(PluginError):
    """The plugin was asked for, and importing it failed. The cause is chained."""


class PluginHookError(PluginError):
    """The plugin's hooks do not fit the contract: one is missing, misspelt, or asks for unknown arguments."""


class CompatibilityError(HyperionError):
    """Two choices of one run cannot work together; found while planning."""


class ModelError(HyperionError):
    """A base model cannot be had, read, or used."""


class DataError(HyperionError):
    """A dataset cannot be had, read, or used."""


class TrainingError(HyperionError):
    """Training cannot start or go on."""


class ArtifactError(HyperionError):
    """What a run left behind cannot be written, or is not what it should be."""


def _details(why: str, fix: str) -> list[str]:
    return [_indent(f"{label}: {printable(text)}") for label, text in (("why", why), ("fix", fix)) if text]


def _line(text: str) -> str:
    """One line: what a user named cannot look like a line of ours."""
    return printable(text).replace("\n", "\\n")


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip("\n").split("\n"))
