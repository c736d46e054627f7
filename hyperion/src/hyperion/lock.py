"""`hyperion.lock`: what a run stands on besides its config, so that a drift is refused and named.

    {"format": 1, "runs": {"config.yaml": {"plugins": …, "libraries": …, "model": …, "data": …}}}

- plugins: of every distribution of the contract that takes part, its version and the SHA-256 of its Python source;
- libraries: versions of Python, of the libraries that a run is built on, and of those that its plugins ask for;
- model: the commit of a hub model, or the SHA-256 of every file of a local one;
- data: SHA-256 of local files or the commit of a hub dataset, how they are split, and a fingerprint of the rows; the
  same of data that a quantizer measures on, and of a file of bits.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.artifact import read_json, sha256, write_json
from hyperion_core.context import Progress
from hyperion_core.distributions import CORE, requirements_of
from hyperion_core.errors import ArtifactError, TrainingError
from hyperion_core.registry import FRAMEWORK

from .data.identity import source_hash
from .data.processor import DatasetProcessor
from .models.hub_commit import commit_of_snapshot, hub_commit

if TYPE_CHECKING:
    from .config import FinetuneConfig
    from .planning import Planned

LOCK = "hyperion.lock"
_FORMAT = 1
# Files hashed in this process, by what changes when they do: a run with --locked asks twice for the base model's.
_HASHES: dict[tuple[Path, int, int, int, int], str] = {}
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.py", "*.gguf")

Facts = dict[str, dict[str, str]]


def gather(planned: Planned, provenance: Mapping[str, Any], progress: Progress, base: Path | None = None) -> Facts:
    """What a run stands on now, as flat texts by section.

    Args:
        provenance: what `DatasetProcessor.provenance` says of prepared data.
        base: the folder of the base model, where a run has it already: of a hub model, the snapshot it loads.

    Raises:
        HyperionError: the model or the data cannot be had.
    """
    data = dict(_flat({**provenance, **_measured(planned, progress)}))
    return {**_software(planned), "model": _model(planned, base, progress), "data": data}


def gather_for(planned: Planned, progress: Progress) -> Facts:
    """The same of a config's own dataset, which is prepared for it.

    Raises:
        HyperionError: the model or the data cannot be had, or the config names no dataset.
    """
    if planned.processor is None:
        raise TrainingError(
            "a config without a dataset cannot be locked",
            why="the lock holds the data's hashes",
            fix="set dataset: in it",
        )
    planned.processor.prepare(progress=progress)
    return gather(planned, planned.processor.provenance(), progress)


def write_lock(path: Path, run: str, facts: Facts) -> None:
    """Put the facts of one run into the lock file; other runs in it stay.

    Raises:
        ArtifactError: the file cannot be written, or is no lock file.
    """
    runs = _runs(path) if path.exists() else {}
    try:
        write_json(path, {"format": _FORMAT, "runs": dict(sorted({**runs, run: facts}.items()))})
    except OSError as error:
        raise ArtifactError(
            f"the lock file {path} cannot be written", why=error.strerror or str(error), fix="give another --output"
        ) from error


def read_lock(path: Path, run: str) -> Facts:
    """The facts of one run.

    Raises:
        ArtifactError: there is no such file, it is damaged, or it does not know the run.
    """
    if not path.exists():
        raise ArtifactError(
            f"there is no lock file {path}", why="--locked compares the run with it", fix=f"hyperion lock {run}"
        )
    runs = _runs(path)
    if run in runs:
        return runs[run]
    raise ArtifactError(
        f"{path} holds no run called {run}", why=f"it holds {', '.join(runs) or 'none'}", fix=f"hyperion lock {run}"
    )


def refuse_drift(path: Path, locked: Facts, now: Facts) -> None:
    """Compare.

    Raises:
        TrainingError: names everything that is not as it was locked.
    """
    drift = [
        f"{section} {name}: {then.get(name, 'not there')} in the lock, {is_now.get(name, 'not there')} now"
        for section in dict.fromkeys([*locked, *now])
        for then, is_now in [(locked.get(section, {}), now.get(section, {}))]
        for name in dict.fromkeys([*then, *is_now])
        if then.get(name) != is_now.get(name)
    ]
    if drift:
        raise TrainingError(
            f"{len(drift)} thing{'s are' if len(drift) > 1 else ' is'} not as {path} has locked",
            why="\n".join(drift),
            fix=_how_to_go_back(locked, now)
            + "accept what is there now with `hyperion lock`, or train without --locked",
        )


def run_name(config: FinetuneConfig) -> str:
    """What a config is called in a lock file: its file's name."""
    return config.file.name if config.file else "config"


def lock_path(config: FinetuneConfig) -> Path:
    """Where a config's lock file is unless said otherwise: beside it."""
    return (config.file.parent if config.file else Path()) / LOCK


def _runs(path: Path) -> dict[str, Facts]:
    content = read_json(path)
    runs: Any = content.get("runs")
    if content.get("format") != _FORMAT or not _are_facts(runs):
        raise ArtifactError(
            f"{path} is no lock file that this version reads",
            why=f'it must have "format": {_FORMAT} and "runs" as `hyperion lock` writes them',
            fix="move it away, then write it again: hyperion lock CONFIG",
        )
    found: dict[str, Facts] = runs
    return found


def _are_facts(runs: Any) -> bool:
    return isinstance(runs, dict) and all(
        isinstance(facts, dict)
        and all(isinstance(section, dict) and all(isinstance(text, str) for text in section.values())
                for section in facts.values())
        for facts in runs.values()
    )  # fmt: skip


def _how_to_go_back(locked: Facts, now: Facts) -> str:
    then, is_now = locked.get("libraries", {}), now.get("libraries", {})
    pins = [f"{name}=={version}" for name, version in then.items() if name != "python" and is_now.get(name) != version]
    return f"python -m pip install {' '.join(pins)}; or " if pins else ""


# --- plugins and libraries ---


def _software(planned: Planned) -> dict[str, dict[str, str]]:
    modules = {CORE: "hyperion_core", FRAMEWORK: "hyperion"}
    libraries: dict[str, str] = dict(planned.plan.versions)
    waiting = [choice.distribution for choice in planned.plan.choices]
    while waiting:
        name = waiting.pop()
        if name in modules or name == "in-process":
            continue
        modules[name] = name.replace("-", "_")
        for requirement in requirements_of(name):
            if _is_of_the_contract(requirement):
                waiting.append(requirement)
            elif version := _version(requirement):
                libraries[requirement] = version
    for choice in planned.plan.choices:  # its entry point knows better how the package is called
        module = type(planned.hooks.plugin(choice.kind, choice.name)).__module__
        modules[choice.distribution] = module.partition(".")[0]
    return {
        "plugins": {
            name: f"{_version(name) or 'in process'}, source {source_hash(module) or 'unknown'}"
            for name, module in sorted(modules.items())
        },
        "libraries": {name: version for name, version in sorted(libraries.items()) if name not in modules},
    }


def _is_of_the_contract(distribution: str) -> bool:
    return CORE in requirements_of(distribution)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- model and data ---


def _model(planned: Planned, base: Path | None, progress: Progress) -> dict[str, str]:
    source = planned.source
    if source.kind == "hub":
        return {"name": source.name, "commit": commit_of_snapshot(base) or hub_commit(source)}
    assert source.path is not None  # of a local source
    files = [source.path] if source.path.is_file() else sorted(_model_files(source.path))
    return {"name": source.name, **{path.name: digest for path, digest in _hashed(files, progress)}}


def _measured(planned: Planned, progress: Progress) -> dict[str, Any]:
    """What decides how the base is quantized, beside the config: named calibration data, and a file of bits."""
    config = planned.config
    found: dict[str, Any] = {}
    if config.quantization is None:
        return {}
    if config.quantization.calibration is not None and config.quantization.calibration.dataset is not None:
        rows = DatasetProcessor(config.quantization.calibration.dataset, base_dir=config.base_dir)
        rows.prepare(progress=progress)
        found["calibration"] = rows.provenance()
    if config.quantization.bit_plan is not None:
        found["bit plan"] = sha256((config.base_dir or Path()) / Path(config.quantization.bit_plan).expanduser())
    return found


def _model_files(folder: Path) -> Iterable[Path]:
    return {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}


def _hashed(files: list[Path], progress: Progress) -> Iterator[tuple[Path, str]]:
    total = sum(path.stat().st_size for path in files)
    with progress.task("hashing the base model", total) as advance:
        for path in files:
            stat = path.stat()
            now = (path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            if now in _HASHES:
                advance(stat.st_size)
            else:
                _HASHES[now] = sha256(path, advance)
            yield path, _HASHES[now]


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "files":
            for file in value:
                yield f"{prefix}{file['name']}", file["sha256"]
        else:
            yield f"{prefix}{key}", str(value)
