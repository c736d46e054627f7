"""A run's folder: claimed before anything is written into it, sealed at the end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperion_core.artifact import ADAPTER, MANIFEST, Artifact, read_json, write_json
from hyperion_core.config import AdapterConfig
from hyperion_core.errors import ArtifactError, TrainingError
from hyperion_core.plan import Plan

from .config import FinetuneConfig
from .governance.model_card import model_card
from .planning import Planned

log = logging.getLogger("hyperion")
PLAN = "plan.json"
DATA = "data.json"
PREPARED = "prepared_adapter.json"
# What a run that failed before its first checkpoint leaves: nothing that anybody would miss.
_REMAINS = frozenset({PLAN, DATA, PREPARED, "metrics.jsonl", "samples.jsonl"})
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
    if not resume and folder.exists() and not _is_free(folder):
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


def write_prepared(folder: Path, prepared: AdapterConfig) -> AdapterConfig:
    """Keep an adapter's config that data has changed, for a run that is resumed."""
    write_json(folder / PREPARED, prepared.model_dump(mode="json", exclude_none=True))
    return prepared


def read_prepared(folder: Path, config: AdapterConfig) -> AdapterConfig:
    """The config in force of a run that is resumed: the one that data has changed, or else the given one."""
    if not (folder / PREPARED).exists():
        return config
    return type(config).parse(read_json(folder / PREPARED), source=str(folder / PREPARED))


def _is_free(folder: Path) -> bool:
    """Whether a new run may have this folder: it is empty, or holds what a run left that never got to a checkpoint."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (PLAN in names and all(name in _REMAINS or name.endswith(".partial") for name in names))


def check_same_data(folder: Path, hashes: Mapping[str, str | None], *, resume: bool) -> None:
    """Record what the run is trained on; when it is resumed, compare.

    Raises:
        TrainingError: the data is not what the run began with.
    """
    if resume and (folder / DATA).exists():
        before = read_json(folder / DATA)
        changed = [name for name, digest in hashes.items() if before.get(name) != digest]
        if changed:
            raise TrainingError(
                f"the {' and '.join(changed)} data is not what the run in {folder} began with",
                why="a resumed run shows the rows that are left, in the order that was drawn for the old ones",
                fix="put the old data back, or start anew in an empty output_dir",
            )
    write_json(folder / DATA, hashes)


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
    old_plan = read_json(folder / PLAN)
    _tell_other_versions(old_plan.get("versions", {}), plan.versions)
    before = _flat(old_plan.get("config", {}))
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


def _tell_other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    for name in changed:
        log.warning(
            "%s was %s when this run began and is %s now: the result may differ in its last digits",
            name, before.get(name, "not there"), now.get(name, "not there"),
        )  # fmt: skip


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_artifact(
    folder: Path,
    planned: Planned,
    config: FinetuneConfig,
    adapter_config: AdapterConfig,
    *,
    metrics: Mapping[str, float],
    data: Mapping[str, Any],
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
        "config": adapter_config.model_dump(mode="json", exclude_none=True),
        "base_model": _base_name(planned, config, folder),
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
            f"the artifact in {folder} cannot be written",
            why=error.strerror or str(error),
            fix="make room, then run again with --resume: the last checkpoint is complete",
        ) from error


def _base_name(planned: Planned, config: FinetuneConfig, folder: Path) -> str:
    """What finds the base again: of a local one, the way from the artifact, since an absolute path tells too much."""
    path = planned.source.path
    if path is None or planned.source.kind == "hub" or config.base_model.startswith("package://"):
        return config.base_model
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of a Windows machine there is no way from one to the other
        return path.as_posix()
