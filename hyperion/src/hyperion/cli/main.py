"""The `hyperion` command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from hyperion_core.errors import HyperionError
from hyperion_core.quiet import ON_IMPORT, errors_only
from hyperion_core.secrets import RedactedStream

from . import compare, data, inspect, lock, merge, plan, plugins, quantize, schema, train, validate
from .usage import ClickError, explained

app = typer.Typer(
    name="hyperion",
    help="Fine-tune large language models from one YAML file. Everything a method can be is a plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("validate")(validate.validate)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("quantize")(quantize.quantize)
app.command("inspect")(inspect.inspect)
app.command("compare")(compare.compare)
app.command("lock")(lock.lock)
app.command("schema")(schema.schema)
app.add_typer(data.app, name="data")
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
    # Whatever prints, a library's bar or our own traceback: no secret of the environment is shown.
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    # Forked tokenizing workers and tokenizers' own threads do not mix; the library would warn about it at length.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # pydantic's plugins: to look for them it reads all that is installed, and one malformed distribution would end it.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        with errors_only(*ON_IMPORT):
            sys.exit(app(prog_name="hyperion", standalone_mode=False))
    except HyperionError as error:
        _stop(error)
    except ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
            error.show()
            sys.exit(error.exit_code)
        _stop(explained(error))
    except typer.Abort:  # standard input ended where a command asked
        sys.exit(1)


def _stop(error: HyperionError) -> NoReturn:
    from .console import show_error

    show_error(error)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
