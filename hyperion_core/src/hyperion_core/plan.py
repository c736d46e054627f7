"""The plan of one run: everything that was decided, before anything heavy is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .distributions import PluginEntry
from .facts import MiB


@dataclass(frozen=True, slots=True)
class Choice:
    """One plugin that takes part: its kind and name, and whose it is."""

    kind: str
    name: str
    distribution: str
    version: str
    origin: str

    @classmethod
    def of(cls, entry: PluginEntry) -> Choice:
        return cls(entry.kind, entry.name, entry.distribution, entry.version, entry.origin)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the plan looked at. "untested" is allowed, and said: nobody ran that pair yet."""

    what: str
    state: Literal["ok", "untested", "unknown", "note"]
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """One run, decided and frozen.

    `config` is the whole config with its defaults, as plain data. `steps` are optimizer steps, None when the data
    is not known yet (`why_no_steps` says why). `memory` is estimated peak bytes by part on the device, empty when
    the model is not known (`why_no_memory`).
    """

    config: Mapping[str, Any]
    choices: tuple[Choice, ...]
    device: str
    dtype: str
    settings: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    steps: int | None = None
    why_no_steps: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)
    why_no_memory: str = ""
    trainable: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) of every line that a person wants to see before a run."""
        lines = [(choice.kind, f"{choice.name}  ({choice.distribution} {choice.version}, {choice.origin})")
                 for choice in self.choices]  # fmt: skip
        lines += [("device", self.device), ("dtype", self.dtype), *self.settings.items()]
        lines.append(("steps", str(self.steps) if self.steps is not None else f"unknown: {self.why_no_steps}"))
        if self.trainable is not None:
            lines.append(("trainable", f"{self.trainable:,} parameters"))
        if self.memory:
            parts = ", ".join(f"{part} {size / MiB:,.0f}" for part, size in self.memory.items())
            lines.append(("memory", f"about {sum(self.memory.values()) / MiB:,.0f} MiB ({parts})"))
        else:
            lines.append(("memory", f"unknown: {self.why_no_memory}"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same for the same plan."""
        return json.loads(json.dumps(asdict(self)))
