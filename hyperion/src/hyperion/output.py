"""A run's folder: claimed before anything is written into it, sealed at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperion_core.artifact import ADAPTER, MANIFEST, Artifact, read_json, write_json
from hyperion_core.errors import ArtifactError, TrainingError
from hyperion_core.plan import Plan

from .config import FinetuneConfig
from .governance.model_card import model_card
from .planning import Planned

PLAN = "plan.json"
# Settings that may differ when a run goes on: they change what is shown or kept, not what is learnt.
_MAY_DIFFER = frozenset(
    {"output_dir", "plugins", "training.logging_steps", "training.save_total_limit", "training.report_to",
     "training.eval_samples", "training.eval_samples_max_new_tokens", "training.push_to_hub", "training.hub_model_id",
     "training.hub_private_repo", "training.run_name"}
)  # fmt: skip


def claim_output(folder: Path, plan: Plan, *, resume: bool) -> tuple[Path, Path | None]:
    """Make sure that a run may write here, and write its plan; gives the folder and the checkpoint to resume from.

    Raises:
        TrainingError: the folder is taken, cannot be written, or cannot be resumed with this plan.
    """
    folder = folder.expanduser()
    checkpoint = _resumable(folder, plan) if resume else None
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainingError(
            f"the output folder {folder} is not empty",
            why="a run never overwrites another one's files",
            fix="choose another output_dir, or go on with an interrupted run: --resume",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, plan.to_dict())
    except OSError as error:
        raise TrainingError(
            f"the output folder {folder} cannot be written", why=error.strerror or str(error),
            fix="choose an output_dir that you may write to, on a disk with room",
        ) from error  # fmt: skip
    return folder, checkpoint


def _resumable(folder: Path, plan: Plan) -> Path:
    from .engine.checkpoints import latest_checkpoint

    if (folder / MANIFEST).exists():
        raise TrainingError(
            f"the run in {folder} is finished", why="there is nothing to resume", fix="choose another output_dir"
        )
    checkpoint = latest_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise TrainingError(
            f"there is no complete checkpoint in {folder}",
            why="the run ended before its first one, or this is another folder",
            fix="start anew in an empty output_dir, without --resume",
        )
    before = _flat(read_json(folder / PLAN).get("config", {}))
    now = _flat(plan.to_dict()["config"])
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if key not in _MAY_DIFFER]
    if changed:
        raise TrainingError(
            f"the config is not the one that the run in {folder} began with",
            why="; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed),
            fix="put the old values back, or start anew in an empty output_dir",
        )
    return checkpoint


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_artifact(
    folder: Path, planned: Planned, config: FinetuneConfig, *, metrics: Mapping[str, float], data: Mapping[str, Any]
) -> Artifact:
    """adapter.json, the model card, and last the manifest.

    Raises:
        ArtifactError: the disk refuses.
    """
    choice = next(choice for choice in planned.plan.choices if choice.kind == "adapter")
    adapter = {
        "type": config.adapter.type,
        "distribution": choice.distribution,
        "version": choice.version,
        "config": config.adapter.model_dump(mode="json", exclude_none=True),
        "base_model": _base_name(planned, config),
        "revision": config.revision,
        "new_tokens": config.new_tokens,
    }
    artifact = Artifact(folder, adapter, dict(metrics), planned.plan.versions, json.loads(json.dumps(data)))
    try:
        write_json(folder / ADAPTER, adapter)
        (folder / "README.md").write_text(model_card(artifact, planned.plan, config), encoding="utf-8")
        return artifact.seal()
    except OSError as error:
        raise ArtifactError(
            f"the artifact in {folder} cannot be written", why=error.strerror or str(error),
            fix="make room, then run again with --resume: the last checkpoint is complete",
        ) from error  # fmt: skip


def _base_name(planned: Planned, config: FinetuneConfig) -> str:
    """What finds the base again: a relative path is of use only from where the config lay."""
    local = planned.source.path is not None and planned.source.kind != "hub"
    if local and not config.base_model.startswith("package://"):
        return str(planned.source.path)
    return config.base_model
