"""`audit:` of a config: where the audit draws its lines."""

from __future__ import annotations

from hyperion_core.config import StrictModel, raise_problems
from hyperion_core.errors import Problem
from hyperion_core.suggest import did_you_mean
from pydantic import Field, PositiveInt, field_validator

#: Every check, and what it looks at, in the order of a report.
CHECKS = {
    "supervised": "enough tokens are learnt, in enough rows",
    "truncation": "max_length leaves the answers whole",
    "eos": "the model learns where to stop",
    "bos": "no row begins with two beginning-of-sequence tokens",
    "masking": "what is learnt is the answers: from their first token to their end",
    "template": "the prompt stands in the tokens as the template writes it",
    "special_tokens": "the template's special tokens are one token each, and none stands in the data's own texts",
    "chat_template": "the config's chat template is the tokenizer's own",
    "duplicates": "rows are not repeated too often",
    "overlap": "no row that is evaluated on is trained on",
}


class AuditConfig(StrictModel):
    """What the audit of the data refuses before training. Shares are from 0 to 1."""

    min_supervised: float = Field(0.001, ge=0, le=1, description="Share of the tokens that must be learnt, at least.")
    max_unlearnt_rows: float = Field(
        0.05, ge=0, le=1, description="Share of rows of which nothing is learnt, at most, cut rows left out."
    )
    max_truncated_answers: float = Field(
        0.05, ge=0, le=1, description="Share of rows whose answers max_length cuts off or shortens, at most."
    )
    max_without_eos: float = Field(
        0.05, ge=0, le=1, description="Share of whole rows whose end is not learnt, at most."
    )
    max_mismatched: float = Field(
        0.01, ge=0, le=1, description="Share of sampled rows whose tokens or labels are not those of the row, at most."
    )
    max_special_in_texts: float = Field(
        0.05, ge=0, le=1, description="Share of sampled chats whose messages hold special tokens, at most."
    )
    max_duplicates: float = Field(0.2, ge=0, le=1, description="Share of rows that repeat an earlier one, at most.")
    duplicates_from: PositiveInt = Field(100, description="Rows from which on duplicates are refused, not warned of.")
    max_overlap: float = Field(
        0.0, ge=0, le=1, description="Share of the rows evaluated on that are also trained on, at most."
    )
    overlap_from: PositiveInt = Field(
        20, description="Evaluation rows from which on overlap is refused, not warned of."
    )
    sample: PositiveInt = Field(2000, description="Rows, evenly spread, that are decoded; counts are taken of all.")
    allow: list[str] = Field(default_factory=list, description="Checks whose refusal is only a warning.")

    @field_validator("allow", mode="after")
    @classmethod
    def _known_checks(cls, value: list[str]) -> list[str]:
        raise_problems(
            [
                Problem(
                    str(index), f"{name!r} is no check", f"there are {', '.join(CHECKS)}", did_you_mean(name, CHECKS)
                )
                for index, name in enumerate(value)
                if name not in CHECKS
            ]
        )
        return value
