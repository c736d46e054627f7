"""The contract between Hyperion and its plugins. Light: nothing here imports torch."""

__version__ = "1.0.0"

from .specs import hookimpl as hookimpl  # below the version, which its modules read

__all__ = ["__version__", "hookimpl"]
