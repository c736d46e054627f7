"""What a user typed that is no command of ours: said in the same four lines as every other error."""

from __future__ import annotations

import re
from typing import Any

import typer
from hyperion_core.errors import HyperionError
from hyperion_core.suggest import closest, did_you_mean

#: What typer raises for a command line that it cannot read. Where it keeps click differs from version to version.
ClickError: type[Any] = typer.BadParameter.__mro__[2]


class UsageError(HyperionError):
    """The command line itself is wrong."""


def known_kind(command: str, kind: str | None) -> None:
    """Check the value of a --kind.

    Raises:
        UsageError: there is no such kind of plugin.
    """
    from hyperion_core.kinds import KINDS

    kinds = [each.kind for each in KINDS]
    if kind is not None and kind not in kinds:
        raise UsageError(
            f"{command} --kind: no kind of plugin is called {kind!r}",
            why=f"there are: {', '.join(kinds)}",
            fix=did_you_mean(kind, kinds, most=len(kinds)),
        )


def explained(error: Any) -> UsageError:
    """typer's error in our words. `error` is a ClickError; one without a command (`ctx`) is told as it is."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message()).rstrip(".")
    if context is None:
        return UsageError(message, why="the command line cannot be read", fix="see `hyperion --help`")
    command = context.command_path
    guess = _meant(error, context, message)
    if option := _unknown_option(error):
        message = f"there is no option {option}"
    return UsageError(
        f"{command}: {message.partition('. Did you mean')[0]}",
        why=" ".join(context.get_usage().split()).replace("Usage: ", "it is used so: "),
        fix=f"did you mean `{guess}`?" if guess else f"see `{command} --help`",
    )


def _meant(error: Any, context: Any, message: str) -> str | None:
    """The closest name to the one that was typed, or None."""
    if option := _unknown_option(error):
        names = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        return closest(option, [name for name in names if name.startswith("-")])
    typed = re.match(r"No such command '(.*?)'", message)
    return closest(typed[1], getattr(context.command, "commands", {})) if typed else None


def _unknown_option(error: Any) -> str | None:
    return str(error.option_name) if type(error).__name__ == "NoSuchOption" else None
