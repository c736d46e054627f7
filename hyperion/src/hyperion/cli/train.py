"""`hyperion train`: one YAML file to a tuned model."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import typer

_SHOWN = ("train_loss", "eval_loss")


def train(
    config: Path = typer.Argument(help="YAML or JSON file of the run."),
    output_dir: str = typer.Option(
        None,
        "--output_dir",
        "--output-dir",
        "-o",
        help="New folder for the run; by default the config's.",
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint in the output folder."),
    locked: bool = typer.Option(
        False,
        "--locked",
        help="Start only if plugins, libraries, model and data are as `hyperion lock` found them.",
    ),
    lock_file: Path = typer.Option(
        None, "--lock-file", help="As --locked, with this file in place of hyperion.lock beside the config."
    ),
    report_to: list[str] = typer.Option(
        None, "--report-to", help="Trackers of transformers: tensorboard, wandb, …; may be repeated."
    ),
) -> None:
    """Train, and leave adapter, plan, metrics and model card in the output folder."""
    from hyperion.config import FinetuneConfig
    from hyperion.engine.interruption import terminate
    from hyperion.lock import lock_path
    from hyperion.planning import make_plan
    from hyperion.trainer import DEFAULT_OUTPUT, Trainer

    from .console import out, show_plan

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hyperion").setLevel(logging.INFO)
    trainer = Trainer(FinetuneConfig.from_file(config))
    changed: dict[str, Any] = {"report_to": report_to} if report_to else {}
    show_plan(make_plan(trainer.config_for(changed)).plan)
    folder = output_dir or trainer.config.output_dir or DEFAULT_OUTPUT
    lock = lock_file or (lock_path(trainer.config) if locked else None)
    signal.signal(signal.SIGTERM, terminate)
    try:
        artifact = trainer.train(output_dir=folder, resume=resume, lock=lock, **changed)
    except KeyboardInterrupt as stopped:
        typer.echo(f"\ninterrupted; {_how_to_go_on(config, folder)}", err=True)
        raise typer.Exit(128 + getattr(stopped, "signum", signal.SIGINT)) from None

    console = out()
    figures = ", ".join(f"{name} {artifact.metrics[name]:.4f}" for name in _SHOWN if name in artifact.metrics)
    console.print(f"[green]done[/green]: {figures}")
    for name, what in (("README.md", "model card"), ("loss.png", "loss curve"), ("metrics.jsonl", "every figure")):
        if (artifact.folder / name).exists():
            console.print(f"  {what}: {artifact.folder / name}", markup=False)


def _how_to_go_on(config: Path, folder: str) -> str:
    """After Ctrl-C. A run that got to no checkpoint begins again, in the same folder."""
    again = f"hyperion train {config} --output_dir {folder}"
    if any(Path(folder).expanduser().glob("checkpoint-*")):
        return f"go on from the last checkpoint: {again} --resume"
    return f"no checkpoint was written yet, so begin again: {again}"
