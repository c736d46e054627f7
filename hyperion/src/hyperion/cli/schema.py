"""`hyperion schema`: lets editors complete and check the YAML."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def schema(output: Path = typer.Option(None, "--output", "-o", help="Write to this file, not to stdout.")) -> None:
    """Write the JSON Schema of a config, with the options of every installed plugin."""
    from hyperion.schema import config_schema

    content = config_schema()
    if output is None:
        from .json_output import print_json

        print_json(content)
        return
    from hyperion_core.errors import ConfigError, Problem

    try:
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        problem = Problem(
            "", "the schema cannot be written", error.strerror or str(error), "give another --output", str(output)
        )
        raise ConfigError([problem], source=str(output)) from error
    typer.echo(f"wrote {output}; add this line to a config: # yaml-language-server: $schema={output}")
