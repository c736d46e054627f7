"""One plugin, imported, made and checked in this process, which is made for it and ends with it: see `doctor`.

The plugin may hang, crash or end this process at any moment. So each stage is noted in a file before it begins, a
watchdog ends the process when the time is up, and both leave the place in the code where it happened.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import QuantizationConfig, StrictModel
from .description import class_facts
from .distributions import PluginEntry
from .errors import Finding, HyperionError
from .hooks import RunHooks, hook_errors
from .kinds import EXPORTS_GROUP, ListedPlugin, Plugin, kind_named
from .registry import Registry

#: Libraries that take seconds to import. A plugin imports them inside its hooks.
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes")
FRAMEWORK_MODULE = "hyperion"
#: Seconds that importing a plugin may take before it is called slow.
SLOW = 1.0
_WAITS = "every command that names it waits for that"
ENTRY, STAGE, TRACE, RESULT = "entry.json", "stage", "trace", "result.json"


def main(folder: str) -> None:
    """Examine the plugin of `folder`/entry.json, leave `folder`/result.json, and end the process."""
    order = json.loads(Path(folder, ENTRY).read_text(encoding="utf-8"))
    entry = entry_from(order["entry"])
    trace = Path(folder, TRACE).open("w", encoding="utf-8")  # noqa: SIM115 - for faulthandler, until the end
    faulthandler.enable(trace)
    faulthandler.dump_traceback_later(order["timeout"], exit=True, file=trace)
    result = _Examiner(entry, Path(folder, STAGE)).examine()
    faulthandler.cancel_dump_traceback_later()
    beside = Path(folder, f"{RESULT}.new")
    beside.write_text(json.dumps(result), encoding="utf-8")
    beside.replace(Path(folder, RESULT))
    os._exit(0)  # threads and exit handlers of the plugin are not waited for


def entry_data(entry: PluginEntry) -> dict[str, str]:
    """What another process needs to import the plugin; conflicts and metadata are settled in this one."""
    return {key: getattr(entry, key) for key in ("kind", "name", "value", "distribution", "version", "origin")}


def entry_from(data: dict[str, Any]) -> PluginEntry:
    """Inverse of `entry_data`."""
    group = EXPORTS_GROUP if data["kind"] == "export" else kind_named(data["kind"]).group
    return PluginEntry(**data, entry_point=importlib.metadata.EntryPoint(data["name"], data["value"], group))


class _Examiner:
    def __init__(self, entry: PluginEntry, stage: Path) -> None:
        self.entry = entry
        self.whose = f'the {entry.kind} "{entry.name}" of {entry.whose}'
        self.stage_file = stage
        self.result: dict[str, Any] = {"findings": [], "seconds": None, "heavy": [], "facts": None}
        self.heavy = _HeavyImports()

    def examine(self) -> dict[str, Any]:
        """Everything that is wrong, and what the plugin says of itself, as plain data."""
        sys.meta_path.insert(0, self.heavy)
        plugin = self._attempt("importing", self._import)
        if self.entry.kind != "export" and plugin is not None:
            self._attempt(
                "checking the hooks of", lambda: self._note(*map(Finding.of, hook_errors(plugin, self.entry)))
            )
            self._attempt("checking the config class of", lambda: self._note(*self._config_findings(plugin)))
            self._attempt("making", lambda: self._make(plugin))
            self._attempt("describing", lambda: self._describe(plugin))
        self._weigh()
        return self.result

    def _attempt(self, stage: str, step: Any) -> Any:
        """One step; whatever it raises is a finding."""
        self.stage_file.write_text(stage, encoding="utf-8")
        try:
            return step()
        except HyperionError as error:
            why = error.why + (_place(error.__cause__) if error.__cause__ else "")
            self._note(Finding("problem", error.what, why, error.fix))
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: this process was made for them
            why = f"{type(error).__name__}: {error}{_place(error)}"
            self._note(Finding("problem", f"{stage} {self.whose} failed", why, self._tell_authors()))
        return None

    def _note(self, *findings: Finding) -> None:
        self.result["findings"] += [asdict(finding) for finding in findings]

    def _import(self) -> Any:
        alone = Registry([self.entry])
        began = time.perf_counter()
        try:
            if self.entry.kind == "export":
                return alone.exported(self.entry.name)
            return alone.load_unchecked(self.entry.kind, self.entry.name)
        finally:
            self.result["seconds"] = round(time.perf_counter() - began, 3)

    def _make(self, plugin: type[Plugin]) -> None:
        made = plugin()
        if not self.result["findings"]:  # else what follows would tell of the same faults again
            config = plugin.config_class.model_construct() if isinstance(made, ListedPlugin) else None
            RunHooks().add(made, self.entry.name, config)

    def _config_findings(self, plugin: type[Plugin]) -> Iterator[Finding]:
        model, base = plugin.config_class, kind_named(self.entry.kind).config_class
        if not (isinstance(model, type) and issubclass(model, base)):
            shown = getattr(model, "__name__", repr(model))
            yield Finding(
                "problem", f"{self.whose} has a config class that is none: {shown}",
                f"config_class must derive from hyperion_core.config.{base.__name__}", self._tell_authors(),
            )  # fmt: skip
            return
        loosened = [f"{key}={model.model_config.get(key)!r}" for key, value in StrictModel.model_config.items()
                    if key in ("extra", "frozen", "strict") and model.model_config.get(key) != value]  # fmt: skip
        if loosened:
            yield Finding(
                "problem", f"{self.whose} has a config class that is not strict: {model.__name__}",
                f"its model_config says {', '.join(loosened)}, so a misspelt key or a wrong type may pass unheard",
                f"{self._tell_authors()}: leave model_config as StrictModel has it",
            )  # fmt: skip
        key = "method" if issubclass(model, QuantizationConfig) else "type"
        default = model.model_fields[key].default
        if model is not base and default not in (self.entry.name, self.entry.qualified):
            yield Finding(
                "problem", f"{self.whose} has a config class that names another plugin: {model.__name__}",
                f"the default of {key} is {default!r}, so {model.__name__}() in Python chooses that one",
                f'{self._tell_authors()}: {key}: str = "{self.entry.name}"',
            )  # fmt: skip
        model.model_json_schema()

    def _describe(self, plugin: type[Plugin]) -> None:
        self.result["facts"] = asdict(class_facts(plugin, self.entry.name))

    def _weigh(self) -> None:
        """What importing it took, after everything that planning a run does with it."""
        found = [name for name in HEAVY if name in sys.modules]
        self.result["heavy"] = found
        places = dict.fromkeys(self.heavy.places[name] for name in found if name in self.heavy.places)
        if found:
            what = f"{self.whose} imports {', '.join(found)} when it is imported or made"
            why = f"at {', '.join(places)}; {_WAITS}" if places else _WAITS
            fix = f"{self._tell_authors()}: import such libraries inside the hooks"
            self._note(Finding("problem", what, why, fix))
        if FRAMEWORK_MODULE in sys.modules:
            what = f"{self.whose} imports the framework: {FRAMEWORK_MODULE}"
            why = "a plugin stands on hyperion_core alone, and so works with every version of the framework"
            self._note(Finding("warning", what, why, f"{self._tell_authors()}: import hyperion_core in its place"))
        elif not found and (self.result["seconds"] or 0) > SLOW:
            what = f"{self.whose} is slow to import: {self.result['seconds']:.1f} s"
            self._note(Finding("warning", what, _WAITS, self._tell_authors()))

    def _tell_authors(self) -> str:
        return f"tell the authors of {self.entry.distribution}"


class _HeavyImports:
    """Sees imports before they happen, and keeps who asked for a heavy library first."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in HEAVY and name not in self.places:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.startswith("<frozen importlib"):
                frame = frame.f_back
            self.places[name] = f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _place(error: BaseException | None) -> str:
    """Where an error was raised, in the plugin or in what it calls: not in what imported it."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    ours = {"hyperion_core", "stevedore", "importlib"}
    own = [frame for frame in frames if frame.filename[:1] != "<" and not ours & {*Path(frame.filename).parts}]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
