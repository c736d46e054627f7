"""The `hyperion` command."""

from __future__ import annotations

import os
import sys

import typer
from hyperion_core.errors import HyperionError

from . import plugins, schema, train, validate

app = typer.Typer(
    name="hyperion",
    help="Fine-tune large language models from one YAML file. Everything a method can be is a plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("validate")(validate.validate)
app.command("train")(train.train)
app.command("schema")(schema.schema)
app.add_typer(plugins.app, name="plugins")


def version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from hyperion import __version__

        typer.echo(f"hyperion-ft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: bool = typer.Option(
        False, "--version", callback=version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options before any command."""


def run() -> None:
    """Run the command line: exit code 0, 2 for an error that says what to do; typer makes it 130 for Ctrl-C."""
    # Forked tokenizing workers and tokenizers' own threads do not mix; the library would warn about it at length.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except HyperionError as error:
        from .console import show_error

        show_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
