"""The contract between Hyperion and its plugins. Light: nothing here imports torch."""

__version__ = "1.0.0"

from .specs import hookimpl as hookimpl  # noqa: E402 - the version is read by modules below

__all__ = ["__version__", "hookimpl"]
