"""What an audit found, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hyperion_core.errors import DataError, printable

_EXCERPT = 70


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check says of one set of rows.

    `counts` are numbers by what they count, `threshold` the line they were held against (None where any one is too
    many), `examples` up to three "row N: excerpt".
    """

    name: str
    state: Literal["ok", "warned", "refused"]
    what: str
    why: str = ""
    fix: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    threshold: float | None = None
    examples: tuple[str, ...] = ()
    data: str = "training"

    def as_data(self, *, examples: bool = True) -> dict[str, Any]:
        """Ready for JSON; without `examples` it holds nothing of the rows' texts."""
        told = {"name": self.name, "data": self.data, "state": self.state, "what": self.what, "why": self.why,
                "fix": self.fix, "counts": dict(self.counts), "threshold": self.threshold}  # fmt: skip
        return {**told, "examples": list(self.examples)} if examples else told

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.data} data: {self.what}"]
        for label, text in (("why", self.why), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return printable("\n".join([*lines, *(f"  {example}" for example in self.examples)]))


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Every finding of an audit, and of how many rows the texts were looked at."""

    findings: tuple[Finding, ...]
    rows: int
    sampled: int

    def of(self, state: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == state)

    @property
    def passed(self) -> bool:
        return not self.of("refused")

    def allowing(self, names: list[str]) -> AuditReport:
        """The same report, with what the user allows only warned of."""
        findings = tuple(
            replace(finding, state="warned", fix="allowed by audit.allow")
            if finding.state == "refused" and finding.name in names
            else finding
            for finding in self.findings
        )
        return replace(self, findings=findings)

    def summary(self) -> str:
        warned = len(self.of("warned"))
        checks = len(self.of("ok"))
        text = f"audit: {checks} check{'' if checks == 1 else 's'} passed"
        return text + (f", {warned} warning{'' if warned == 1 else 's'}" if warned else "")

    def as_data(self, *, examples: bool = True) -> dict[str, Any]:
        """Ready for JSON. Without `examples` nothing of the data's texts is in it: so it is kept in an artifact."""
        return {
            "passed": self.passed,
            "rows": self.rows,
            "sampled": self.sampled,
            "findings": [finding.as_data(examples=examples) for finding in self.findings],
        }

    def refuse(self) -> None:
        """Raise for every refusal at once.

        Raises:
            AuditError: a `DataError` with all of them.
        """
        if not self.passed:
            raise AuditError(self)


class AuditError(DataError):
    """The audit refuses the data. `report` holds every finding."""

    def __init__(self, report: AuditReport) -> None:
        self.report = report
        count = len(report.of("refused"))
        super().__init__(
            f"the audit refuses the data: {count} check{'' if count == 1 else 's'} failed",
            why="training on it would silently teach something else than what you mean",
            fix="mend what is listed, or let a check only warn: audit: {allow: ["
            + ", ".join(dict.fromkeys(finding.name for finding in report.of("refused")))
            + "]}",
        )

    def __str__(self) -> str:
        head, *rest = DataError.__str__(self).splitlines()
        found = [f"  {line}" for finding in self.report.of("refused") for line in str(finding).splitlines()]
        return "\n".join([f"{head}:", *found, *rest])


def excerpt(text: str) -> str:
    """The beginning of a text, on one line, without what a terminal would obey."""
    flat = " ".join(text.split())
    return printable(flat if len(flat) <= _EXCERPT else flat[: _EXCERPT - 1] + "…")


def share(part: int, whole: int) -> str:
    """ "12 of 40 (30 %)"."""
    return f"{part:,} of {whole:,} ({100 * part / whole:.3g} %)" if whole else "0 of 0"
