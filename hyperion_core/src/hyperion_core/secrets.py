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
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

MASK = "***"
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
    for secret in _secrets():
        if secret in text:
            text = text.replace(secret, MASK)
    if ":/" in text:
        text = _IN_URL.sub(lambda found: f"{found[1] or found[2]}{MASK}@", text)
    return _SHAPES.sub(MASK, text)


def hide_in_logs(logger: logging.Logger) -> None:
    """Mask the secrets in what is logged with this very logger, tracebacks too; its children need their own call.

    Doing so twice does no harm."""
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


def _secrets() -> Iterator[str]:
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
    return iter(sorted(found, key=len, reverse=True))


def _mask(record: logging.LogRecord) -> bool:
    """A logging filter: it changes the record, and keeps it."""
    shown = record.getMessage()
    masked = redacted(shown)
    if masked != shown:
        record.msg, record.args = masked, ()
    if record.exc_info:
        record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
    return True
