"""4-bit and 8-bit base weights for Hyperion, through bitsandbytes. Importing it imports neither that nor torch."""

from .config import BnbConfig
from .plugin import BnbQuantizer

__all__ = ["BnbConfig", "BnbQuantizer"]
