"""GPTQ for Hyperion, through gptqmodel. Importing it imports neither torch nor gptqmodel."""

from .config import GptqConfig
from .plugin import GptqQuantizer

__all__ = ["GptqConfig", "GptqQuantizer"]
