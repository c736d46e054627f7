"""What to write into a config to choose a plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# Where the config of each kind stands; the other kinds have no key in a config yet.
_PLACES = {
    "adapter": ("adapter",),
    "quantizer": ("quantization",),
    "objective": ("objective",),
    "scheduler": ("training", "lr_scheduler"),
}


def config_snippet(kind: str, name: str, example: Mapping[str, Any], needs: Sequence[str] = ()) -> str:
    """YAML for a config file; "" for a kind that no key of a config chooses yet.

    Args:
        example: the plugin's own options, its name among them.
        needs: what a user has to add, each a comment.
    """
    if kind == "observer":
        return f"plugins: [{name}]\n"
    if kind not in _PLACES:
        return ""
    data: Any = dict(example)
    for key in reversed(_PLACES[kind]):
        data = {key: data}
    text = str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False))
    indent = "  " * len(_PLACES[kind])
    return text + "".join(f"{indent}# {line}\n" for line in needs)
