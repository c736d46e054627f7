"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hyperion_core.config import PluginConfig
from hyperion_core.errors import DataError
from hyperion_core.facts import Segment, Segments, Sequence
from hyperion_core.kinds import Objective

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SftConfig", "SftObjective"]


class SftConfig(PluginConfig):
    """Supervised fine-tuning has no options."""

    type: str = "sft"


class SftObjective(Objective):
    """One sequence a row; its supervised tokens are learnt."""

    config_class = SftConfig

    def objective_sequences(self, config: SftConfig, row: Mapping[str, Any]) -> list[Sequence]:
        """The row's `messages`, or its `segments` of `{"text", "supervised"}`; one of the two may be empty.

        Raises:
            DataError: the row has neither, or is not of that form.
        """
        messages, segments = row.get("messages"), row.get("segments")
        try:
            if messages:
                return [Sequence(messages=tuple(_without_none(message) for message in messages))]
            if segments:
                return [Sequence(segments=tuple(Segment(part["text"], part["supervised"]) for part in segments))]
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                "a row is not of the form that the objective sft reads",
                why=f"{type(error).__name__}: {error}",
                fix='give "messages", a list of mappings, or "segments", a list of {"text": …, "supervised": …}',
            ) from error
        raise DataError(
            "a row holds nothing that the objective sft can learn",
            why=f"it has neither messages nor segments; its keys: {', '.join(sorted(map(str, row))) or 'none'}",
            fix="prepare the rows with hyperion.data.DatasetProcessor, or remove the empty ones",
        )

    def objective_loss(
        self, config: SftConfig, logps: Tensor, segments: Segments, normalizer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-Σ logps / normalizer: nats a supervised token, once the step's micro-batches are added up. No metrics."""
        return -logps.sum() / normalizer, {}


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    # Arrow gives every message all the keys that any message has; a chat template would take None for a value.
    return {key: value for key, value in message.items() if value is not None}
