"""`hyperion merge`: a run's adapter becomes part of the weights."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path

import typer


class Into(str, Enum):
    """How the merged weights are held."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    quantized = "quantized"


def merge(
    run: Path = typer.Argument(help="The output folder of a finished run."),
    output_dir: Path = typer.Option(..., "--output-dir", "--output_dir", "-o", help="New folder for the merged model."),
    into: Into = typer.Option(
        None,
        "--into",
        help="Number format of a plain transformers model, or the base's own quantization again. By default float16 "
        "for a quantized base, and else the base's own format.",
    ),
    max_kl: float = typer.Option(
        None,
        "--max-kl",
        help="Mean KL divergence in nats a token that the merged model may be away at most. By default what its number "
        "format makes, and no more than three quarters of what the adapter itself does.",
    ),
    min_top1: float = typer.Option(
        None, "--min-top1", help="Share of positions, 0 to 1, at which the likeliest token has to be the same."
    ),
    prompts: Path = typer.Option(
        None,
        "--prompts",
        help="Texts to compare on: one a line, or .jsonl. By default the run's samples, and plain text.",
    ),
    base_model: str = typer.Option(None, "--base-model", help="Where the base model lies now, if not where it was."),
) -> None:
    """Merge a run's adapter into its base: a model that stands alone, compared with the tuned one before it is let out.

    On a quantized base the change is added to the weights that it was trained on, those that the quantized ones stand
    for; they are left in full precision, or quantized again (--into quantized).
    """
    from rich.text import Text

    from hyperion.exporting import export_merged
    from hyperion.monitoring.progress import RichProgress
    from hyperion.quantization.parity_texts import read_texts

    from .console import out
    from .interrupted import nothing_written

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with nothing_written():
        done = export_merged(
            run,
            output_dir,
            into=None if into is None else into.value,
            base_model=base_model,
            prompts=None if prompts is None else read_texts(prompts),
            max_kl=max_kl,
            min_top1=min_top1,
            progress=RichProgress(),
        )
    console = out()
    console.print(Text("merged", style="green") + Text(f" into {done.folder} ({done.held})"))
    console.print(Text(f"  {done.parity.summary()}"))
    if done.unknown_format:
        console.print(Text("  for Hyperion alone: plain transformers does not know this format", style="yellow"))
