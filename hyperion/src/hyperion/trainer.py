"""`Trainer`: a run from Python, with the arguments of the field's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import Artifact
from hyperion_core.context import Progress
from hyperion_core.errors import ConfigError, Problem

from .config import FinetuneConfig

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_OUTPUT = "./hyperion-output"


class Trainer:
    """Runs a config.

    Example:
        >>> trainer = Trainer(config=config)                                   # doctest: +SKIP
        >>> trainer.train(train_dataset=train, eval_dataset=evaluation, num_train_epochs=3)  # doctest: +SKIP
    """

    def __init__(self, config: FinetuneConfig) -> None:
        if not isinstance(config, FinetuneConfig):
            raise ConfigError(
                [
                    Problem(
                        "config",
                        f"a {type(config).__name__} is no FinetuneConfig",
                        fix="Trainer(config=FinetuneConfig(…))",
                    )
                ],
                source="Trainer",
            )
        self.config = config
        self._datasets: tuple[Dataset | None, Dataset | None] = (None, None)

    def train(
        self,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        lock: str | Path | None = None,
        progress: Progress | None = None,
        **training: Any,
    ) -> Artifact:
        """Train, and leave an artifact in `output_dir`.

        Args:
            train_dataset, eval_dataset: what `DatasetProcessor.prepare()` gives; without them the last call's, and
                before any call the config's.
            output_dir: where the run goes; the config's, or ./hyperion-output.
            resume: go on from the last complete checkpoint in `output_dir`.
            lock: a lock file of `hyperion lock`; the run starts only when nothing in it has changed.
            progress: shows long operations; the default draws bars on a terminal.
            **training: any key of `training:` (`num_train_epochs`, `eval_steps`, `push_to_hub`, …), for this call.

        Returns:
            The finished artifact; `artifact.metrics` are its last figures.

        Raises:
            ConfigError: with every problem at once.
            HyperionError: the run cannot start or go on.
        """
        from .monitoring.progress import RichProgress
        from .pipeline import run

        if train_dataset is None:
            train_dataset, last = self._datasets
            eval_dataset = eval_dataset if eval_dataset is not None else last
        self._datasets = (train_dataset, eval_dataset)
        config = self.config_for(training)
        return run(
            config,
            output_dir=output_dir or config.output_dir or DEFAULT_OUTPUT,
            train=train_dataset,
            evaluation=eval_dataset,
            resume=resume,
            lock=None if lock is None else Path(lock),
            progress=progress or RichProgress(),
        )

    def config_for(self, training: dict[str, Any]) -> FinetuneConfig:
        """The config with some of its `training:` keys replaced; None puts a key's default back."""
        if not training:
            return self.config
        merged = {**self.config.training.given(), **training}
        merged = {key: value for key, value in merged.items() if value is not None}
        return self.config.replace(training=merged)
