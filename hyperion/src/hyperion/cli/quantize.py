"""`hyperion quantize`: a model's folder to a checkpoint in fewer bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hyperion.quantizing import Quantized


def quantize(
    model: str = typer.Argument(help="A hub id, a folder, a GGUF file, or package://module/file."),
    output_dir: Path = typer.Option(..., "--output-dir", "--output_dir", "-o", help="New folder for the checkpoint."),
    method: str = typer.Option(None, "--method", help="The quantizer; by default one that can do the rest."),
    bits: str = typer.Option(None, "--bits", help="Bits a weight, or auto: each module its own. By default 4."),
    target_bits: float = typer.Option(None, "--target-bits", help="With auto: the bytes of so many bits everywhere."),
    budget_mb: float = typer.Option(None, "--budget-mb", help="With auto: so many MB for the whole model."),
    group_size: int = typer.Option(None, "--group-size", help="Weights that share a scale."),
    bit_plan: Path = typer.Option(None, "--bit-plan", help="A file of bits by module, in place of --bits."),
    calibration: str = typer.Option(
        None, "--calibration", help="Data to measure on: a path, a hub id, or package://module/file."
    ),
    options: list[str] = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Any other option of the method, or of calibration; may be repeated."
    ),
    dtype: str = typer.Option("auto", "--dtype", help="Of what is not quantized: float32, bfloat16 or float16."),
    revision: str = typer.Option(None, "--revision", help="Revision of a hub model."),
    max_kl: float = typer.Option(
        None, "--max-kl", help="Mean KL divergence in nats a token that it may be away from the model at most."
    ),
    min_top1: float = typer.Option(
        None, "--min-top1", help="Share of positions, 0 to 1, at which the likeliest token has to be the same."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Quantize a model into a new folder, load that again, and compare its answers with the model's."""
    from hyperion_core.context import NoProgress

    from hyperion.monitoring.progress import RichProgress
    from hyperion.quantizing import quantize as make

    from .interrupted import nothing_written

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hyperion").setLevel(logging.WARNING if as_json else logging.INFO)
    given = {
        "method": method,
        "bits": None if bits is None else _bits(bits),
        "target_bits": target_bits,
        "budget_mb": budget_mb,
        "group_size": group_size,
        "bit_plan": None if bit_plan is None else str(bit_plan),
    }
    with nothing_written():
        done = make(
            model,
            _merged(given, calibration, options or []),
            output_dir=output_dir,
            revision=revision,
            dtype=dtype,
            max_kl=max_kl,
            min_top1=min_top1,
            progress=NoProgress() if as_json else RichProgress(),
        )
    if as_json:
        from .json_output import print_json

        print_json(done.as_data(), ensure_ascii=False)
        return
    _show(done)


def _bits(text: str) -> Any:
    return int(text) if text.isdecimal() else text


def _merged(given: dict[str, Any], calibration: str | None, options: list[str]) -> dict[str, Any]:
    """What may stand below `quantization:`, from all options."""
    from .usage import UsageError
    from .values import key_and_value, nested, parsed

    pairs: dict[str, str] = {}
    for key, value in (key_and_value("--set", text) for text in options):
        if key in pairs or given.get(key) is not None:
            raise UsageError(f"--set {key} says what is said already", why="an option has one value",
                             fix="leave one of the two out")  # fmt: skip
        pairs[key] = value
    found = nested({key: parsed("--set", value) for key, value in pairs.items()})
    if calibration is not None:
        more = found.get("calibration")
        found["calibration"] = {**(more if isinstance(more, dict) else {}), "dataset": calibration}
    return {key: value for key, value in given.items() if value is not None} | found


def _show(done: Quantized) -> None:
    from rich.text import Text

    from .console import out

    console = out()
    console.print(Text("quantized", style="green") + Text(f" with {done.method} into {done.folder}"))
    for label, (before, after) in (("on disk", done.disk), ("in memory", done.memory)):
        line = f"  {label}: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after ({after / before:.0%})"
        console.print(Text(line))
    console.print(Text(f"  {done.parity.summary()}"))
    if not done.plain:
        console.print(Text("  for Hyperion alone: plain transformers does not know this format", style="yellow"))
    console.print(Text(f"  {done.seconds:.0f} seconds; look into it: hyperion inspect {done.folder}"))
