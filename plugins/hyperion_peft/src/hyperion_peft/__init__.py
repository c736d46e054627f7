"""What Hyperion's adapters that run on PEFT share. Importing it imports neither peft nor torch."""

from .adapter import PeftAdapter, Targets
from .targets import ALL_LINEAR, Selection, compact, pattern_problems, peft_mapping, saved_modules, select

__all__ = [
    "ALL_LINEAR",
    "PeftAdapter",
    "Selection",
    "Targets",
    "compact",
    "pattern_problems",
    "peft_mapping",
    "saved_modules",
    "select",
]
