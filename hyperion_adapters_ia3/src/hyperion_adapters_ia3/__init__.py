"""(IA)³ for Hyperion, through PEFT. Importing it imports neither peft nor torch."""

from .config import IA3Config
from .plugin import IA3Adapter

__all__ = ["IA3Adapter", "IA3Config"]
