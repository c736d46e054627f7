"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hyperion_core.config import PluginConfig
from hyperion_core.errors import DataError
from hyperion_core.facts import Segment, Sequence, TokenScores
from hyperion_core.kinds import Objective
from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SftConfig", "SftObjective"]


class SftConfig(PluginConfig):
    """Supervised fine-tuning: cross-entropy, and what may be added to it."""

    type: str = "sft"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target that is spread over the whole vocabulary (1512.00567)."
    )
    z_loss: float = Field(
        0.0, ge=0, description="Weight of log²(Σ exp(logits)), which keeps logits from growing (PaLM, 2204.02311)."
    )


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
        self, config: SftConfig, logps: Tensor, scores: TokenScores, normalizer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-Σ logps / normalizer: nats a supervised token, once the step's micro-batches are added up.

        Where something is added to it, the metric "nll" is this loss without what was added.
        """
        nll = -logps.sum() / normalizer
        if not config.label_smoothing and not config.z_loss:
            return nll, {}
        loss = nll
        if config.label_smoothing:
            everywhere = (scores.logsumexp - scores.mean_logit()).sum() / normalizer
            loss = (1 - config.label_smoothing) * nll + config.label_smoothing * everywhere
        if config.z_loss:
            loss = loss + config.z_loss * scores.logsumexp.square().sum() / normalizer
        return loss, {"nll": nll}


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    # Arrow gives every message all the keys that any message has; a chat template would take None for a value.
    return {key: value for key, value in message.items() if value is not None}
