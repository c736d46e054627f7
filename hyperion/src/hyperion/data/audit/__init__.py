"""The supervision audit: whether the data would teach what it is meant to, found before any weight is loaded."""

from __future__ import annotations

from .config import CHECKS, AuditConfig
from .findings import AuditError, AuditReport, Finding

__all__ = ["CHECKS", "AuditConfig", "AuditError", "AuditReport", "Finding"]
