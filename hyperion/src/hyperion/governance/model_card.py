"""The model card: README.md of an artifact, with what the run itself measured and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hyperion_core.artifact import Artifact
from hyperion_core.plan import Plan
from hyperion_core.secrets import redacted, redacted_data

if TYPE_CHECKING:
    from hyperion.config import FinetuneConfig

FOR_HYPERION_ALONE = (
    "**Do not load it with plain transformers**: that does not know its format, {format}, fills what is quantized with "
    "random numbers, and only warns. Hyperion loads it, named as `base_model`."
)
_PLAIN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
_LIMITS = """## Limits

The adapter was judged on the held-out rows of its own data alone. It inherits the limits, the biases and the licence of
its base model; check both before you publish it."""


def model_card(artifact: Artifact, plan: Plan, config: FinetuneConfig) -> str:
    """Markdown with the front matter that the Hub reads. Secrets of the environment are masked in its texts."""
    artifact, plan, base_model = redacted_data(artifact), redacted_data(plan), redacted(config.base_model)
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(artifact, base_model), sort_keys=False, allow_unicode=True) + "---",
        f"# A {artifact.adapter['type']} adapter for {public_name(base_model)}",
        "Tuned with Hyperion. Every figure below was measured by this run.",
        _table("Training", _public_rows(plan, base_model)),
        _table("Results", [(name, f"{value:.6g}") for name, value in artifact.metrics.items()]),
        "Every logged step is in `metrics.jsonl`."
        + (" ![Loss](loss.png)" if (artifact.folder / "loss.png").exists() else ""),
        _table("Data", [(key, _inline(value)) for key, value in artifact.data.items() if value not in (None, [], {})]),
        _samples(artifact),
        _loading(artifact),
        _LIMITS,
        _table("Versions", list(artifact.versions.items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merged_card(artifact: Artifact, held: str, parity: Mapping[str, Any], *, unknown_format: str = "") -> str:
    """README.md of a model that an adapter was merged into: where it comes from, and how near it is to that.

    Args:
        artifact: the run's, whose adapter it was.
        held: how the weights are held now: "float16", or "4 bits by bnb".
        parity: the content of parity.json.
        unknown_format: the one that its config.json names, where plain transformers does not know it.
    """
    artifact = redacted_data(artifact)
    base_model, kind = str(artifact.adapter["base_model"]), str(artifact.adapter["type"])
    front = {**_front_matter(artifact, base_model), "library_name": "transformers"}
    was = (artifact.adapter.get("quantization") or {}).get("method")
    results = [(name, f"{value:.6g}") for name, value in artifact.metrics.items()]
    origin = [
        ("base", public_name(base_model)),
        ("adapter", f"{kind}, {artifact.adapter['distribution']} {artifact.adapter['version']}"),
        ("base while it was trained", f"quantized by {was}" if was else "not quantized"),
        ("weights now", held),
    ]
    figures = [(key, _inline(value)) for key, value in parity["figures"].items() if value not in ([], None)]
    asked = [(f"tolerance: {key}", _inline(value)) for key, value in parity["tolerance"].items()]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {public_name(base_model)} with a {kind} adapter merged into it",
        "Tuned with Hyperion. The adapter's change is part of the weights: no adapter has to be loaded.",
        _table("Origin", origin),
        _table("Parity with base and adapter apart", [*figures, *asked]),
        "KL divergences are nats a token. What was compared is in `parity.json`.",
        _table("Results of the run, before merging", results),
        "## Loading\n\n" + (FOR_HYPERION_ALONE.format(format=f"`{unknown_format}`") if unknown_format else _PLAIN),
        f"Its weights are {held}: the library of {was} has to be installed." if held.endswith(f" by {was}") else "",
        _LIMITS,
        _table("Versions of the training", list(artifact.versions.items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_name(base_model: str) -> str:
    """A base model's name for others: of a local path only its last part, since the rest is nobody's business."""
    local = base_model.startswith((".", "~")) or Path(base_model).is_absolute()
    return Path(base_model).name if local else base_model


def _public_rows(plan: Plan, base_model: str) -> list[tuple[str, str]]:
    return [
        (label, text.replace(base_model, public_name(base_model))) for label, text in plan.rows() if label != "memory"
    ]


def _front_matter(artifact: Artifact, base_model: str) -> dict[str, Any]:
    front: dict[str, Any] = {"tags": ["hyperion", str(artifact.adapter["type"])], "pipeline_tag": "text-generation"}
    if (artifact.folder / "adapter_config.json").exists():
        front["library_name"] = "peft"
    if not base_model.startswith(("package://", ".", "/", "~")) and base_model.count("/") == 1:
        front["base_model"] = base_model
    return front


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {label} | {_cell(text)} |" for label, text in rows]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_inline(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(_inline(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value)


def _samples(artifact: Artifact, most: int = 3) -> str:
    file = artifact.folder / "samples.jsonl"
    if not file.exists():
        return ""
    last = [
        redacted_data(json.loads(line)) for line in file.read_text(encoding="utf-8").strip("\n").split("\n")[-most:]
    ]
    shown = [
        f"**Prompt** (step {sample['step']})\n\n{_quoted(sample['prompt'])}\n\n**Expected**\n\n"
        f"{_quoted(sample['expected'])}\n\n**Generated**\n\n{_quoted(sample['generated'])}"
        for sample in last
    ]
    return "\n\n".join(["## Samples", *shown])


def _quoted(text: str) -> str:
    # Indented code: neither backticks nor headings in a sample can break the card.
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _loading(artifact: Artifact) -> str:
    lines = ["## Loading", "", "```python", "from hyperion.models import load_tuned", "",
             'model, tokenizer = load_tuned("path/to/this/folder")', "```"]  # fmt: skip
    if (artifact.folder / "adapter_config.json").exists():
        lines += ["", "It is in PEFT's format: `peft.PeftModel.from_pretrained(base, folder)` loads it too."]
    return "\n".join(lines)
