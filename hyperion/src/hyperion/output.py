"""A run's folder: claimed before anything is written into it, sealed at the end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hyperion_core.artifact import ADAPTER, MANIFEST, Artifact, read_json, write_json
from hyperion_core.config import AdapterConfig
from hyperion_core.errors import TrainingError
from hyperion_core.plan import Plan

from .config import FinetuneConfig
from .governance.model_card import model_card
from .lock import LOCK
from .monitoring.metrics import MetricsFile
from .planning import Planned
from .quantization.planning import BIT_PLAN, HEAT_MAP

log = logging.getLogger("hyperion")
PLAN = "plan.json"
DATA = "data.json"
PREPARED = "prepared_adapter.json"
# What a run that failed before its first checkpoint leaves: nothing that anybody would miss.
_REMAINS = frozenset({PLAN, DATA, PREPARED, LOCK, BIT_PLAN, HEAT_MAP, "metrics.jsonl", "timing.jsonl", "samples.jsonl"})
RESUMED = "resumed.jsonl"
_IN_USE = ".in-use.lock"
# Settings that may differ when a run goes on: they change what is shown or kept, or where, not what is learnt.
_MAY_DIFFER = frozenset(
    {"output_dir", "plugins", "training.logging_steps", "training.save_total_limit", "training.report_to",
     "training.eval_samples", "training.eval_samples_max_new_tokens", "training.push_to_hub", "training.hub_model_id",
     "training.hub_private_repo", "training.run_name", "training.recompute_layers", "training.gradient_checkpointing",
     "training.activation_checkpointing", "training.offload_activations", "training.stream_weights",
     "training.memory_check"}
)  # fmt: skip


@contextmanager
def output_folder(folder: Path, *, resume: bool) -> Iterator[tuple[Path, Path | None]]:
    """Inside, the folder is this run's alone. Gives it, and the checkpoint to resume from.

    Light: entered before anything heavy is imported. A run that fails before it trains leaves the folder as it was.

    Raises:
        TrainingError: the folder is taken, cannot be written, is in use, or holds nothing to resume.
    """
    folder = _checked(folder, resume=resume)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _held(folder):
            try:
                yield folder, _last_checkpoint(folder) if resume else None
            except BaseException:
                _take_back(folder)
                raise
    finally:
        with suppress(OSError, ValueError):  # not empty, mostly; and a path with a NUL in it never was
            for path in missing:
                path.rmdir()


def _checked(folder: Path, *, resume: bool) -> Path:
    try:
        folder = folder.expanduser()
        taken = folder.exists() and not _is_free(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(folder, error) from error
    if resume:
        _check_resumable(folder)
    elif taken:
        is_file = folder.is_file()
        raise TrainingError(
            f"the output folder {folder} is {'a file' if is_file else 'not empty'}",
            why="a run never overwrites another one's files",
            fix="choose another output_dir" + ("" if is_file else ", or go on with an interrupted run: --resume"),
        )
    _check_place(folder)
    return folder


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Made if need be, and locked: the system lets go of the lock of a run that was killed."""
    lock = FileLock(folder / _IN_USE)
    others = False
    try:  # a signal may come at any line of this
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        yield
    except Timeout as error:
        others = True
        raise TrainingError(
            f"another run is writing into {folder}",
            why=f"it holds {_IN_USE} there, and two runs would mix their files",
            fix="wait until it has ended, or choose another output_dir",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        if lock.is_locked:  # it is the run's own
            raise
        raise _unwritable(folder, error) from error
    finally:
        if not others:
            with suppress(OSError, ValueError):  # in a folder that has vanished there is none
                (folder / _IN_USE).unlink(missing_ok=True)
            lock.release()


def _check_place(folder: Path) -> None:
    """What mkdir would stumble over, found before anything heavy is imported."""
    if folder.is_symlink() and not folder.exists():
        raise TrainingError(
            f"the output folder {folder} is a link to nowhere",
            why=f"it points to {os.readlink(folder)}",
            fix="remove the link, make the folder that it points to, or choose another output_dir",
        )
    above = next((parent for parent in folder.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise _unwritable(folder, NotADirectoryError(0, f"{above} is a file"))


def claim_output(folder: Path, plan: Plan, checkpoint: Path | None) -> None:
    """Write the run's plan; a run that is resumed must have the same one, but for what is allowed, and recorded.

    Raises:
        TrainingError: the folder cannot be written, or cannot be resumed with this plan.
    """
    try:
        if checkpoint is not None:
            _check_same_plan(folder, plan, checkpoint)
        else:  # of a run that was killed before its first checkpoint: bits that were shared out for another config
            for name in (BIT_PLAN, HEAT_MAP):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    write_plan(folder, plan)


def write_plan(folder: Path, plan: Plan) -> None:
    """The plan, or in its place what became of it.

    Raises:
        TrainingError: the folder cannot be written.
    """
    try:
        write_json(folder / PLAN, plan.to_dict())
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"the output folder {folder} cannot be written",
        why=getattr(error, "strerror", None) or str(error),
        fix="choose an output_dir that you may write to, on a disk with room",
    )


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
    names = {path.name for path in folder.iterdir()} - {_IN_USE}
    whole = {name for name in names if not name.endswith(".partial")}
    return not whole or (PLAN in whole and whole <= _REMAINS)


def _take_back(folder: Path) -> None:
    """What a run wrote that failed before it trained: nothing half-written stays, the folder is free."""
    begun = (PLAN, DATA, PREPARED, LOCK, BIT_PLAN, HEAT_MAP)
    with suppress(OSError):  # the folder has vanished, or can no longer be written: that error is told, not this one
        if all(path.name in (*begun, _IN_USE) for path in folder.iterdir()):
            for name in begun:
                (folder / name).unlink(missing_ok=True)


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


def _check_resumable(folder: Path) -> None:
    """What can be said before the folder is held: another run may be writing into it."""
    if (folder / MANIFEST).exists():
        raise TrainingError(
            f"the run in {folder} is finished", why="there is nothing to resume", fix="choose another output_dir"
        )
    if not folder.is_dir():
        raise _no_checkpoint(folder, "there is no such folder", "without --resume")


def _last_checkpoint(folder: Path) -> Path:
    from .engine.checkpoints import latest_checkpoint, remove_remains

    remove_remains(folder)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint
    if _is_free(folder):
        raise _no_checkpoint(folder, "the run ended before its first one", "in the same folder, without --resume")
    raise _no_checkpoint(folder, "this is another folder, or the run's checkpoints are damaged", "in an empty folder")


def _no_checkpoint(folder: Path, why: str, where: str) -> TrainingError:
    return TrainingError(f"there is no complete checkpoint in {folder}", why=why, fix=f"begin again {where}")


def _check_same_plan(folder: Path, plan: Plan, checkpoint: Path) -> None:
    old_plan = read_json(folder / PLAN)
    before = _flat(old_plan.get("config", {}))
    now = _flat(plan.to_dict()["config"])
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    refused = [key for key in changed if key not in _MAY_DIFFER and not key.startswith("audit.")]
    if refused:
        raise TrainingError(
            f"the config is not the one that the run in {folder} began with",
            why="; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in refused),
            fix="put the old values back, or start anew in an empty output_dir",
        )
    _record_resume(folder, checkpoint, changed, old_plan.get("versions", {}), plan.versions)


def _record_resume(
    folder: Path, checkpoint: Path, config: list[str], before: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """A line in resumed.jsonl, which the artifact keeps: where the run went on, and what was no longer the same."""
    versions = {
        name: [before.get(name, "not there"), now.get(name, "not there")]
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    for name, (then, is_now) in versions.items():
        log.warning(
            "%s was %s when this run began and is %s now: the result may differ in its last digits", name, then, is_now
        )
    MetricsFile(folder / RESUMED).append({"checkpoint": checkpoint.name, "versions": versions, "config": config})


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
    calibration: str | None,
) -> Artifact:
    """adapter.json, the model card, and last the manifest. `calibration`: hash of what a quantizer measured on."""
    choice = next(choice for choice in planned.plan.choices if choice.kind == "adapter")
    quantization = config.quantization
    adapter = {
        "type": config.adapter.type,
        "distribution": choice.distribution,
        "version": choice.version,
        "config": adapter_config.model_dump(mode="json", exclude_none=True),
        "base_model": _base_name(planned, config, folder),
        "revision": config.revision,
        "new_tokens": config.new_tokens,
        "quantization": quantization.model_dump(mode="json", exclude_none=True) if quantization else None,
        "calibration": calibration,
    }
    artifact = Artifact(folder, adapter, dict(metrics), planned.plan.versions, json.loads(json.dumps(data)))
    write_json(folder / ADAPTER, adapter)
    (folder / "README.md").write_text(model_card(artifact, planned.plan, config), encoding="utf-8")
    return artifact.seal()


def _base_name(planned: Planned, config: FinetuneConfig, folder: Path) -> str:
    """What finds the base again: of a local one, the way from the artifact, since an absolute path tells too much."""
    path = planned.source.path
    if path is None or planned.source.kind == "hub" or config.base_model.startswith("package://"):
        return config.base_model
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of a Windows machine there is no way from one to the other
        return path.as_posix()
