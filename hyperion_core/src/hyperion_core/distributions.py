"""What is installed, read from metadata alone: nothing of a plugin is imported here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from . import __version__
from .kinds import EXPORTS_GROUP, KINDS

CORE = "hyperion-core"


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """One entry point of one distribution.

    `origin` says where the distribution came from: "index", "local folder", "local file", "editable", or a URL.
    `contract` is what it asks of hyperion-core (a version range, "" for any), None when it does not say.
    `target` is a class given in process, without a distribution behind it.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    origin: str
    contract: str | None = ""
    missing: tuple[str, ...] = ()
    entry_point: importlib.metadata.EntryPoint | None = None
    target: type | None = None

    @property
    def qualified(self) -> str:
        """The name that is unique where two distributions offer the same one."""
        return f"{self.distribution}:{self.name}"

    @property
    def whose(self) -> str:
        return f"{self.distribution} {self.version}"

    def fits_contract(self) -> bool:
        """Whether this hyperion-core is one that the plugin was built for."""
        return self.contract is not None and Requirement(f"{CORE}{self.contract}").specifier.contains(
            __version__, prereleases=True
        )


def installed_plugins(path: list[str] | None = None) -> list[PluginEntry]:
    """Every entry point of every kind, over all distributions (on `path`, or `sys.path`), in a stable order.

    A distribution whose metadata cannot be read offers nothing, and breaks nothing: `unreadable_distributions`.
    """
    found: list[PluginEntry] = []
    seen: set[str] = set()
    for distribution in distributions_on(path):
        with contextlib.suppress(Exception):
            found += _entries(distribution, seen)
    return sorted(found, key=lambda entry: (entry.kind, entry.name, entry.distribution))


def unreadable_distributions(path: list[str] | None = None) -> list[tuple[str, str]]:
    """Distributions that may offer plugins and whose metadata cannot be read: where each lies, and why."""
    found = []
    for distribution in distributions_on(path):
        try:
            list(_entries(distribution, set()))
        except Exception as error:
            where = str(getattr(distribution, "_path", "") or distribution.locate_file(""))
            found.append((where, f"{type(error).__name__}: {error}"))
    return found


def distributions_on(path: list[str] | None = None) -> Iterator[importlib.metadata.Distribution]:
    """All distributions on `path`, or `sys.path`: one that hides another of its name comes first."""
    return iter(importlib.metadata.distributions(path=path) if path else importlib.metadata.distributions())


def _entries(distribution: importlib.metadata.Distribution, seen: set[str]) -> Iterator[PluginEntry]:
    kinds = {kind.group: kind.kind for kind in KINDS} | {EXPORTS_GROUP: "export"}
    if "hyperion." not in (distribution.read_text("entry_points.txt") or ""):
        return
    metadata = distribution.metadata
    if "Name" not in metadata or "Version" not in metadata:  # what an interrupted uninstall leaves behind
        return
    name = metadata["Name"]
    if canonicalize_name(name) in seen:  # an older copy further down the path, which Python never imports
        return
    seen.add(canonicalize_name(name))
    requirements = list(_requirements(distribution))
    for entry_point in distribution.entry_points:
        if entry_point.group in kinds:
            yield PluginEntry(
                kind=kinds[entry_point.group],
                name=entry_point.name,
                value=entry_point.value,
                distribution=canonicalize_name(name),
                version=distribution.version,
                origin=_origin(distribution),
                contract=_contract(requirements),
                missing=tuple(_missing(requirements)),
                entry_point=entry_point,
            )


def requirements_of(name: str) -> list[str]:
    """Names of what an installed distribution asks for on this machine, extras left out; empty when there is none."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted({canonicalize_name(requirement.name) for requirement in _requirements(distribution)})


def _requirements(distribution: importlib.metadata.Distribution) -> Iterable[Requirement]:
    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # pip refuses to install such metadata; one found on a path must not stop the others
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _contract(requirements: list[Requirement]) -> str | None:
    for requirement in requirements:
        if canonicalize_name(requirement.name) == CORE:
            return str(requirement.specifier)
    return None


def _missing(requirements: list[Requirement]) -> Iterable[str]:
    for requirement in requirements:
        if canonicalize_name(requirement.name) == CORE:
            continue
        try:
            metadata = importlib.metadata.metadata(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield str(requirement)
            continue
        except UnicodeDecodeError:
            yield f"{requirement} (one with unreadable metadata is installed)"
            continue
        try:
            version = metadata["Version"] if "Version" in metadata else ""  # noqa: SIM401 - typed without get
            fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            yield f"{requirement} ({version or 'a broken one'} is installed)"


def _origin(distribution: importlib.metadata.Distribution) -> str:
    try:
        direct = json.loads(distribution.read_text("direct_url.json") or "null")
    except ValueError:
        direct = None
    if not isinstance(direct, dict):
        return "index"
    if "dir_info" in direct:
        # The folder itself stays out: plans and model cards are published, paths of a machine are nobody's business.
        return "editable" if direct["dir_info"].get("editable") else "local folder"
    commit = direct.get("vcs_info", {}).get("commit_id")
    url = str(direct.get("url", ""))
    return ("local file" if url.startswith("file:") else url) + (f"@{commit}" if commit else "")
