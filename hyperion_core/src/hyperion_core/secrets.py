"""Secrets of the environment, kept out of everything that is shown or written.

Like the runners of CI services, this knows a secret by the name of its environment variable, by its shape, or by its
place in a URL, and shows `***` instead.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote

MASK = "***"
_T = TypeVar("_T")
_NAME = re.compile(
    r"(^|_)(API_?)?(TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|KEYS?|APIKEY|CREDENTIALS?|PAT)(_|$)", re.I
)
_NO_SECRET = re.compile(r"_(PATH|FILE|DIR|HOME|NAME|SOCK)$", re.I)
_SHORTEST = 8  # a shorter value ("false", "none") would mask words that are no secret
_IN_URL = re.compile(r"(://)[^/\s@]+@|(:/)[^/\s@:]+:[^/\s@]+@")  # with one slash where a URL was taken for a path
_SHAPES = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=\bBearer )\s*[A-Za-z0-9._~+/=-]{8,}"
)


def redacted(text: str) -> str:
    """The same text, `***` in place of secrets.

    They are: values of at least 8 characters of environment variables called like HF_TOKEN, WANDB_API_KEY or
    AWS_SECRET_ACCESS_KEY, unless they are paths; user and password in a URL; and access tokens of well-known shapes.
    """
    return _masked(text, _secrets())


def redacted_data(data: _T) -> _T:
    """The same data, `redacted` in every text, keys too; numbers stay what they are, whatever a secret looks like.

    For all that becomes JSON or a table: a secret of digits alone would, in the finished text, take figures with it.
    Looks into mappings, lists, tuples and dataclasses; the data given is not changed.
    """
    return _masked_data(data, _secrets())


def hide_in_logs(logger: logging.Logger) -> None:
    """Mask the secrets in what is logged with this logger and with those below it that exist by now, tracebacks too.

    Filters are not inherited, so call it again once plugins are loaded: twice does no harm."""
    below = f"{logger.name}."
    for name, each in list(logger.manager.loggerDict.items()):
        if name.startswith(below) and isinstance(each, logging.Logger):
            each.addFilter(_mask)
    logger.addFilter(_mask)


class RedactedStream(io.TextIOBase):
    """A text stream that writes to another one, with the secrets masked. For a command's stdout and stderr.

    It has no `buffer`: bytes would go past it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def write_redacted(self, text: str) -> None:
        """For text that was made of `redacted_data`: it goes through as it is."""
        self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has it as an attribute
        return str(self._stream.encoding)

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)


def _masked(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, MASK)
    if ":/" in text:
        text = _IN_URL.sub(lambda found: f"{found[1] or found[2]}{MASK}@", text)
    return _SHAPES.sub(MASK, text)


def _masked_data(data: Any, secrets: list[str]) -> Any:
    if isinstance(data, str):
        return _masked(data, secrets)
    if isinstance(data, Mapping):
        return {_masked_data(key, secrets): _masked_data(value, secrets) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        masked = [_masked_data(each, secrets) for each in data]
        return masked if isinstance(data, list) else tuple(masked)
    if is_dataclass(data) and not isinstance(data, type):
        given = [each.name for each in fields(data) if each.init]
        return replace(data, **{name: _masked_data(getattr(data, name), secrets) for name in given})
    return data


def _secrets() -> list[str]:
    """The longest first, so that one that holds another is masked whole."""
    found = set()
    for name, value in os.environ.items():
        if not _NAME.search(name) or _NO_SECRET.search(name) or value.startswith(("/", "~", ".")):
            continue
        for line in value.splitlines():
            if len(line.strip()) >= _SHORTEST:
                secret = line.strip()
                # as it is, in a URL, in JSON, and as Python shows it
                found |= {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    return sorted(found, key=len, reverse=True)


def _mask(record: logging.LogRecord) -> bool:
    """A logging filter: it changes the record, and keeps it."""
    try:
        shown = record.getMessage()
    except Exception:  # arguments that do not fit are told by the handler, as logging does; they end no run
        return True
    masked = redacted(shown)
    if masked != shown:
        record.msg, record.args = masked, ()
    if record.exc_info:
        record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
    return True
