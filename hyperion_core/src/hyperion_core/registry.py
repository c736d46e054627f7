"""Which plugin is meant: found in metadata, settled before any import, then loaded alone.

Two distributions that offer one name, a plugin built for another contract, a missing requirement: all are found
without importing anything. A broken plugin that nobody asked for is never imported, so it breaks nothing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from packaging.utils import canonicalize_name
from stevedore.driver import DriverManager

from . import __version__
from .distributions import CORE, PluginEntry, installed_plugins
from .errors import (
    PluginConflictError,
    PluginContractError,
    PluginError,
    PluginLoadError,
    PluginNotFoundError,
    PluginRequirementError,
)
from .hooks import check_hooks
from .kinds import KINDS, Plugin, kind_named, with_article
from .suggest import closest

FRAMEWORK = "hyperion-ft"


class Registry:
    """An index of plugins, by kind and name."""

    def __init__(self, entries: Iterable[PluginEntry] = ()) -> None:
        self._entries = list(entries)
        self._loaded: dict[PluginEntry, Any] = {}
        self._fitting: set[tuple[PluginEntry, type[Plugin]]] = set()  # whose hooks fit the contract

    @classmethod
    def discover(cls, path: list[str] | None = None) -> Registry:
        """What is installed now."""
        return cls(installed_plugins(path))

    def add(self, plugin: type[Plugin], name: str, *, distribution: str = "in-process", version: str = "0") -> None:
        """Register a class that no distribution carries: for notebooks and tests.

        Raises:
            PluginHookError: its hooks do not fit the contract.
        """
        entry = PluginEntry(
            plugin.kind, name, f"{plugin.__module__}:{plugin.__qualname__}", distribution, version, "in process",
            target=plugin,
        )  # fmt: skip
        check_hooks(plugin, entry)
        self._entries.append(entry)

    def entries(self, kind: str | None = None) -> list[PluginEntry]:
        """What is there, broken or not."""
        return [entry for entry in self._entries if kind is None or entry.kind == kind]

    def named(self, name: str, kind: str | None = None) -> list[PluginEntry]:
        """Every plugin called `name` ("lora", or "acme-lora:lora"): of several kinds or owners, broken or not.

        Raises:
            PluginNotFoundError: there is none.
        """
        kinds = [kind] if kind else [each.kind for each in KINDS]
        found = [entry for each in kinds for entry in self._same_name(each, name)]
        if found:
            return found
        if kind:
            raise self._not_found(kind, name)
        names = sorted(
            {entry.qualified if ":" in name else entry.name for entry in self._entries if entry.kind in kinds}
        )
        raise PluginNotFoundError(
            f'no installed distribution has a plugin called "{name}"',
            why=f"installed: {', '.join(names)}" if names else "no plugin is installed at all",
            fix=f'did you mean "{near}"?' if (near := closest(name, names)) else "see `hyperion plugins list`",
        )

    def find(self, kind: str, name: str) -> PluginEntry:
        """The one entry that `name` ("lora", or "acme-lora:lora") means, checked by its metadata alone.

        Raises:
            PluginNotFoundError, PluginConflictError, PluginContractError, PluginRequirementError
        """
        entry = self._only_one(kind, name)
        self._check_metadata(entry)
        return entry

    def load(self, kind: str, name: str) -> type[Plugin]:
        """The plugin's class: imports its module, and no other plugin's.

        Raises:
            PluginError: as `find`, and PluginLoadError or PluginHookError.
        """
        plugin, entry = self.load_unchecked(kind, name), self.find(kind, name)
        if (entry, plugin) not in self._fitting:
            check_hooks(plugin, entry)
            self._fitting.add((entry, plugin))
        return plugin

    def load_unchecked(self, kind: str, name: str) -> type[Plugin]:
        """As `load`, but whether its hooks fit is left to the caller: to tell everything that is wrong with a plugin.

        Raises:
            PluginError: as `find`, and PluginLoadError.
        """
        entry = self.find(kind, name)
        plugin = self._import(entry)
        base = kind_named(kind)
        if not (isinstance(plugin, type) and issubclass(plugin, base)):
            raise PluginLoadError(
                f'the {kind} "{name}" of {entry.whose} is not {with_article(kind)}: '
                f"{entry.value} is {_described(plugin)}",
                why=f"an entry point of {base.group} must be a class derived from hyperion_core.kinds.{base.__name__}",
                fix=f"tell the authors of {entry.distribution}",
            )
        return plugin

    def create(self, kind: str, name: str) -> Plugin:
        """An instance of the plugin, for one run.

        Raises:
            PluginError: as `load`, and PluginLoadError where making it fails.
        """
        plugin = self.load(kind, name)
        try:
            return plugin()
        except Exception as error:
            entry = self.find(kind, name)
            raise PluginLoadError(
                f'the {kind} "{entry.name}" of {entry.whose} cannot be made',
                why=f"{plugin.__name__}() raised {type(error).__name__}: {error}",
                fix=f"a plugin is made without arguments; tell the authors of {entry.distribution}",
            ) from error

    def exported(self, name: str) -> Any:
        """A public name that lives in a plugin, for `from hyperion import NAME`.

        Raises:
            PluginError: nobody offers it, several do, or its module is broken.
        """
        return self._import(self.find("export", name))

    def state(self, entry: PluginEntry) -> str:
        """ "ok", or what `find` would say of it, in a word. Imports nothing."""
        if len(list(self._same_name(entry.kind, entry.name))) > 1:
            return "conflict"
        try:
            self._check_metadata(entry)
        except PluginContractError:
            return "wrong contract"
        except PluginRequirementError:
            return "missing requirement"
        return "ok"

    def _same_name(self, kind: str, name: str) -> list[PluginEntry]:
        owner, _, bare = name.rpartition(":")
        return [
            entry
            for entry in self._entries
            if entry.kind == kind
            and entry.name == bare
            and (not owner or canonicalize_name(entry.distribution) == canonicalize_name(owner))
        ]

    def _only_one(self, kind: str, name: str) -> PluginEntry:
        found = self._same_name(kind, name)
        if not found:
            raise self._not_found(kind, name)
        if len(found) > 1:
            raise PluginConflictError(
                f'{len(found)} distributions offer the {kind} "{name}": '
                + " and ".join(entry.whose for entry in found),
                why="a plugin is chosen by its name, so a name must have one owner",
                fix="import it from its own module: " + " or ".join(_import_statement(entry) for entry in found)
                if kind == "export"
                else "say whose you mean: " + " or ".join(f'"{entry.qualified}"' for entry in found),
            )
        return found[0]

    def _not_found(self, kind: str, name: str) -> PluginNotFoundError:
        names = sorted({entry.name for entry in self._entries if entry.kind == kind})
        qualified = sorted({entry.qualified for entry in self._entries if entry.kind == kind})
        near = closest(name, qualified if ":" in name else names)
        if near:
            fix = f'did you mean "{near}"?'
        elif ":" in name:
            fix = f"python -m pip install {name.partition(':')[0]}"
        elif canonicalize_name(name) in _extras():
            fix = f'python -m pip install "{FRAMEWORK}[{name}]"'
        else:
            fix = "install the distribution that offers it, then see `hyperion plugins list`"
        return PluginNotFoundError(
            f'no installed distribution has {with_article(kind)} called "{name}"',
            why=f"installed: {', '.join(names)}" if names else f"no {kind} is installed at all",
            fix=fix,
        )

    def _check_metadata(self, entry: PluginEntry) -> None:
        if not entry.fits_contract():
            raise PluginContractError(
                f'the {entry.kind} "{entry.name}" of {entry.whose} was built for another contract',
                why=f"it asks for {CORE}{entry.contract}, and {CORE} {__version__} is installed"
                if entry.contract is not None
                else f"its metadata does not say which {CORE} it was built for",
                fix=f"python -m pip install --upgrade {entry.distribution}"
                if entry.contract is not None
                else f'its authors must add "{CORE}>={__version__.split(".")[0]}" to its dependencies',
            )
        if entry.missing:
            raise PluginRequirementError(
                f'the {entry.kind} "{entry.name}" of {entry.whose} lacks a requirement',
                why=f"it requires {', '.join(entry.missing)}",
                fix=_install_command(entry.missing),
            )

    def _import(self, entry: PluginEntry) -> Any:
        if entry.target is not None:
            return entry.target
        if entry not in self._loaded:
            try:
                self._loaded[entry] = _OneDriver(entry).driver
            except PluginError:
                raise
            except (Exception, SystemExit) as error:  # a plugin that exits at import must not end the command unheard
                raise _load_error(entry, error) from error
        return self._loaded[entry]


class _OneDriver(DriverManager):  # type: ignore[type-arg] # generic in its newest versions only
    """stevedore's driver loading, given the one entry point that the index has settled on.

    stevedore itself would import every duplicate before it complains.
    """

    def __init__(self, entry: PluginEntry) -> None:
        assert entry.entry_point is not None
        self._winner: importlib.metadata.EntryPoint = entry.entry_point
        super().__init__(entry.entry_point.group, entry.name, on_load_failure_callback=_reraise)

    def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return [self._winner]


def _reraise(manager: Any, entry_point: importlib.metadata.EntryPoint, error: BaseException) -> None:
    raise error


def _load_error(entry: PluginEntry, error: BaseException) -> PluginError:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    own = entry.value.partition(":")[0].partition(".")[0]
    if missing and missing.partition(".")[0] != own:
        return PluginRequirementError(
            f'the {entry.kind} "{entry.name}" of {entry.whose} needs the module "{missing}"',
            why="it is not installed, and the plugin's metadata does not ask for it",
            fix=f"python -m pip install {missing.partition('.')[0]}, and tell the authors of {entry.distribution}",
        )
    return PluginLoadError(
        f'the {entry.kind} "{entry.name}" of {entry.whose} is broken',
        why=f"importing {entry.value} raised {type(error).__name__}: {error}",
        fix=f"python -m pip install --force-reinstall {entry.distribution}, or choose another {entry.kind}",
    )


def _install_command(missing: tuple[str, ...]) -> str:
    return "python -m pip install " + " ".join(f'"{text.partition(" (")[0]}"' for text in missing)


def _import_statement(entry: PluginEntry) -> str:
    module, _, attribute = entry.value.partition(":")
    return f"from {module} import {attribute}"


def _extras() -> set[str]:
    """What may stand in `hyperion-ft[...]`, where that is installed."""
    try:
        metadata = importlib.metadata.metadata(FRAMEWORK)
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {canonicalize_name(extra) for extra in metadata.get_all("Provides-Extra") or ()}


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


_current: Registry | None = None


def registry() -> Registry:
    """The registry in use: what is installed, indexed once a process, unless a test set another."""
    global _current
    if _current is None:
        _current = Registry.discover()
    return _current


def use(chosen: Registry | None) -> Registry | None:
    """Make `chosen` the registry in use (None: discover anew at the next call); gives the one before."""
    global _current
    before, _current = _current, chosen
    return before
