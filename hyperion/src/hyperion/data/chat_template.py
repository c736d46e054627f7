"""`dataset.chat_template`: Jinja as text, or the path of a file that holds it."""

from __future__ import annotations

import re
from pathlib import Path

from hyperion_core.errors import DataError, Problem

_KEY = "dataset.chat_template"
# transformers' own tag, which marks what the assistant says; plain Jinja does not know it.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def read_chat_template(given: str, base_dir: Path | None) -> str:
    """The template's text. What has no brace in it, or ends in .jinja, is a path, relative to `base_dir`.

    Raises:
        DataError: the file cannot be read, or what it holds is no Jinja.
    """
    text = given
    if given.strip().endswith(".jinja") or "{" not in given:
        path = Path(base_dir or ".", Path(given.strip()).expanduser())
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise DataError(
                f"the chat template {given.strip()} cannot be read",
                why=getattr(error, "strerror", None) or str(error),
                fix="give the path of a .jinja file, relative to the config, or the template itself",
            ) from error
    _check(text)
    return text


def chat_template_problems(given: str | None, base_dir: Path | None) -> list[Problem]:
    """What is wrong with `dataset.chat_template`."""
    if given is None:
        return []
    try:
        read_chat_template(given, base_dir)
    except DataError as error:
        return [Problem(_KEY, error.what, error.why, error.fix)]
    return []


def chat_template_effect(format: str | None) -> list[Problem]:
    """What is wrong with a chat template for rows of this format; None is not known yet."""
    if format in (None, "chat"):
        return []
    why = "only chat rows go through a chat template"
    return [Problem(_KEY, f"has no effect on {format} rows", why, 'set format: "chat", or take `chat_template` out')]


def _check(text: str) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(_GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        raise DataError(
            "the chat template is not valid Jinja",
            why=f"line {error.lineno}: {error.message}",
            fix="copy it again from where it comes, or leave dataset.chat_template out",
        ) from error
    if "messages" not in text:
        raise DataError(
            "the chat template reads no messages",
            why="a chat template is Jinja over `messages`; this is another text",
            fix="give the template itself, or the path of a .jinja file",
        )
