"""Weights in 2 to 8 bits through torchao, for Hyperion. Importing it imports neither torch nor torchao."""

from .config import TorchaoConfig
from .plugin import TorchaoQuantizer

__all__ = ["TorchaoConfig", "TorchaoQuantizer"]
