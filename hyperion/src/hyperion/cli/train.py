"""`hyperion train`: one YAML file to a tuned model."""

from __future__ import annotations

import logging
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
    report_to: list[str] = typer.Option(
        None, "--report-to", help="Trackers of transformers: tensorboard, wandb, …; may be repeated."
    ),
) -> None:
    """Train, and leave adapter, plan, metrics and model card in the output folder."""
    from hyperion.config import FinetuneConfig
    from hyperion.planning import make_plan
    from hyperion.trainer import Trainer

    from .console import out, show_plan

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hyperion").setLevel(logging.INFO)
    trainer = Trainer(FinetuneConfig.from_file(config))
    changed: dict[str, Any] = {"report_to": report_to} if report_to else {}
    show_plan(make_plan(trainer.config_for(changed)).plan)
    artifact = trainer.train(output_dir=output_dir, resume=resume, **changed)

    console = out()
    figures = ", ".join(f"{name} {artifact.metrics[name]:.4f}" for name in _SHOWN if name in artifact.metrics)
    console.print(f"[green]done[/green]: {figures}")
    for name, what in (("README.md", "model card"), ("loss.png", "loss curve"), ("metrics.jsonl", "every figure")):
        if (artifact.folder / name).exists():
            console.print(f"  {what}: {artifact.folder / name}")
