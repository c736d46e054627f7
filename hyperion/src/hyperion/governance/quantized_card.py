"""README.md of a quantized checkpoint: how it was made, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hyperion_core.secrets import redacted, redacted_data

from .model_card import FOR_HYPERION_ALONE, public_name

if TYPE_CHECKING:
    from hyperion.quantization.parity import Parity

_PLAIN = "Plain transformers loads it as well, with the library of its format, {format}."
_END = """It inherits the limits, the biases and the licence of the model that it was made of; check both before you
publish it. Every figure here was measured when it was made; `parity.json` and `quantized.json` hold all of them."""


def quantized_card(record: Mapping[str, Any], parity: Parity, *, from_hub: bool) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        record: the content of quantized.json.
    """
    record = redacted_data(record)
    front: dict[str, Any] = {"tags": ["hyperion", str(record["method"])], "pipeline_tag": "text-generation"}
    if from_hub:
        front |= {"base_model": record["base_model"], "base_model_relation": "quantized"}
    disk, memory = record["bytes_on_disk"], record["bytes_in_memory"]
    options = ", ".join(f"`{key}: {value}`" for key, value in record["options"].items())
    rows = {
        "made of": record["base_model"],
        "method": f"{record['method']} ({record['distribution']} {record['version']})",
        "options": options,
        "weights on disk": f"{disk['before'] / 1e6:,.1f} MB → {disk['after'] / 1e6:,.1f} MB",
        "weights in memory": f"{memory['before'] / 1e6:,.1f} MB → {memory['after'] / 1e6:,.1f} MB",
        "answers": redacted(parity.summary()),
    }
    lines = [f"| {label} | {str(text).replace('|', chr(92) + '|')} |" for label, text in rows.items()]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
            "",
            f"# {record['base_model']}, quantized with {record['method']}",
            "",
            "| | |",
            "| --- | --- |",
            *lines,
            "",
            "To load it, or to train on top of it, with Hyperion: name this folder as `base_model`. "
            + (_PLAIN if record["plain_transformers"] else FOR_HYPERION_ALONE).format(format=f"`{record['format']}`"),
            "",
            _END,
            "",
        ]
    )


def options_for_others(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of local files the name alone: where they lie is nobody's business."""
    found = dict(options)
    if found.get("bit_plan"):
        found["bit_plan"] = Path(found["bit_plan"]).name
    if "calibration" in found:
        named = {**found["calibration"]}
        found["calibration"] = named | {"dataset": public_name(named["dataset"])} if named.get("dataset") else named
    return found
