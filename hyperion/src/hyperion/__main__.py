"""`python -m hyperion` is the `hyperion` command."""

from .cli.main import run

run()
