"""An objective's hook as a function of a row, for worker processes: pluggy's callers do not travel, plugins do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hyperion_core.facts import Sequence
from hyperion_core.kinds import Plugin

if TYPE_CHECKING:
    from hyperion_core.config import PluginConfig


@dataclass(frozen=True)
class RowHook:
    """`objective_sequences` of one plugin with its config; like any hook, it may take fewer arguments than given."""

    objective: Plugin
    config: PluginConfig

    def __call__(self, row: Mapping[str, Any]) -> list[Sequence]:
        hook: Any = self.objective.objective_sequences  # type: ignore[attr-defined]
        given = {"config": self.config, "row": row}
        return hook(**{name: given[name] for name in inspect.signature(hook).parameters})
