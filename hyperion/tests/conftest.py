"""Fixtures of the framework's own tests."""

from forking import cli as cli
