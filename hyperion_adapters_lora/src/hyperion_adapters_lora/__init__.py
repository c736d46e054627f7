"""LoRA for Hyperion, through PEFT. Importing it imports neither peft nor torch."""

from .config import LoraConfig
from .plugin import LoraAdapter

__all__ = ["LoraAdapter", "LoraConfig"]
