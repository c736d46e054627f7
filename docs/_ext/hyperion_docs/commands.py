"""The reference of commands, from the command line itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .markdown import code, sentence, table


def commands() -> Iterator[tuple[str, Any]]:
    """("hyperion plugins list", its click command) of every command, in the order of `--help`."""
    from typer.main import get_command

    from hyperion.cli.main import app

    yield from _walk("hyperion", get_command(app))


def parameters(command: Any) -> list[Any]:
    """What a user may type, `--help` left out."""
    return [each for each in command.params if each.name != "help" and not getattr(each, "hidden", False)]


def described(command: Any) -> str:
    """What the command says of itself."""
    return sentence(command.help or "")


def render() -> str:
    parts = []
    for name, command in commands():
        words = " ".join(_usage(each) for each in parameters(command))
        parts += [f"## {name}", described(command), f"```text\n{' '.join(filter(None, [name, words]))}\n```"]
        if rows := [_parameter(each) for each in parameters(command)]:
            parts.append(table(("", "meaning", "default"), rows))
    return "\n\n".join(parts)


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", {})
    if not children or parameters(command):
        yield name, command
    for child, below in children.items():
        yield from _walk(f"{name} {child}", below)


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
        return shown if parameter.required else f"[{shown}]"
    word = parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {parameter.name.upper()}"
    return word if parameter.required else f"[{word}]"


def _parameter(parameter: Any) -> tuple[str, str, str]:
    argument = parameter.param_type_name == "argument"
    names = parameter.name.upper() if argument else ", ".join(parameter.opts + parameter.secondary_opts)
    shown = " ".join(code(part) for part in names.split(" ")) if argument else code(names)
    default = parameter.default
    wanted = "" if default in (None, False, ()) or callable(default) or parameter.required else code(str(default))
    return shown, sentence(getattr(parameter, "help", "") or ""), "required" if parameter.required else wanted
