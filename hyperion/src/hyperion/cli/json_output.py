"""JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from hyperion_core.secrets import RedactedStream, redacted_data


def print_json(data: Any, *, ensure_ascii: bool = True) -> None:
    """Secrets are masked in its texts alone: it stays JSON, with the figures that it has."""
    text = json.dumps(redacted_data(data), indent=2, ensure_ascii=ensure_ascii) + "\n"
    write = sys.stdout.write_redacted if isinstance(sys.stdout, RedactedStream) else sys.stdout.write
    write(text)
