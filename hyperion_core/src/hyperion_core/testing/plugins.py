"""What every plugin of every kind must do, whatever its hooks: be found, be light, take a strict config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from ..config import StrictModel
from ..errors import ConfigError
from ..examination import HEAVY
from ..kinds import Plugin
from ..registry import registry as current_registry


class PluginConformance:
    """Base of the suites. A test inherits one of those, and sets `plugin`.

    plugin: the entry point's name, or "distribution:name".
    options: what the config cannot do without; {} where all options have defaults.
    """

    kind: ClassVar[str]
    plugin: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """The entry point's name alone."""
        return self.plugin.rpartition(":")[2]

    @pytest.fixture
    def plugin_class(self) -> type[Plugin]:
        """The class, found and checked as a run finds it."""
        return current_registry().load(self.kind, self.plugin)

    @pytest.fixture
    def config(self, plugin_class: type[Plugin]) -> StrictModel:
        """The plugin's config with `options`, defaults else."""
        return plugin_class.config_class.parse(self.options)

    def test_importing_the_plugin_is_light(self) -> None:
        """Importing its module imports no torch, transformers or peft: planning a run stays fast."""
        module, heavy = self._imported(HEAVY)
        assert not heavy, f"importing {module} imports {heavy}: do so inside the hooks"

    def test_importing_the_plugin_leaves_the_framework_out(self) -> None:
        """A plugin stands on the contract alone: it must work with any version of the framework."""
        module, framework = self._imported(("hyperion",))
        assert not framework, f"importing {module} imports hyperion: import hyperion_core only"

    def test_the_config_round_trips(self, config: StrictModel) -> None:
        """Written as JSON and read again, a config is equal to itself."""
        written = config.model_dump_json()
        try:
            again = type(config).parse(json.loads(written))
        except ConfigError as error:
            pytest.fail(f"a config that is written out cannot be read again: {error}")
        assert again == config, "a config that is written out and read again is another one"

    def test_the_config_names_its_plugin(self, config: StrictModel) -> None:
        """The default of `type` (of `method`, for a quantizer) is the entry point's name."""
        key = "method" if "method" in type(config).model_fields else "type"
        assert getattr(config, key) == self.name, f"the default of {key} must be the entry point's name"

    def test_an_unknown_key_is_refused_with_a_suggestion(self, config: StrictModel) -> None:
        """A misspelt option is an error that names the right one."""
        key = max(type(config).allowed_keys(), key=len)
        misspelt = key[:-1]
        try:
            type(config).parse({**self.options, misspelt: None})
        except ConfigError as error:
            fixes = [problem.fix for problem in error.problems if problem.path == misspelt]
        else:
            pytest.fail(f"the unknown key {misspelt!r} is not refused: keep the config strict")
        assert any(key in fix for fix in fixes), f"{misspelt!r} is refused, and no fix names {key!r}: {fixes}"

    def test_the_config_has_a_json_schema(self, config: StrictModel) -> None:
        """Editors can complete its options, and see that there are no others."""
        schema = type(config).model_json_schema()
        hidden = sorted(set(type(config).allowed_keys()) - set(schema["properties"]))
        assert not hidden, f"the JSON schema of the config lacks options that it takes: {hidden}"
        assert schema.get("additionalProperties") is False, "the JSON schema of the config lets unknown options pass"

    def _imported(self, names: tuple[str, ...]) -> tuple[str, str]:
        """The plugin's module, and which of `names` a fresh Python has imported with it."""
        entry = current_registry().find(self.kind, self.plugin)
        if entry.target is not None:
            pytest.skip("this class was registered in process: it has no module to import afresh")
        module = entry.value.partition(":")[0]
        code = f"import sys, {module}; print(*(name for name in {names!r} if name in sys.modules))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"importing {module} fails in a fresh Python: {done.stderr}"
        return module, done.stdout.strip()
