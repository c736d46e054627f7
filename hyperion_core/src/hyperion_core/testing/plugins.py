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
from ..kinds import Plugin
from ..registry import registry as current_registry

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes")


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
        entry = current_registry().find(self.kind, self.plugin)
        if entry.target is not None:
            pytest.skip("this class was registered in process: it has no module to import afresh")
        code = f"""if True:
            import importlib, sys
            importlib.import_module({entry.value.partition(":")[0]!r})
            print(*(name for name in {HEAVY!r} if name in sys.modules))
        """
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not done.stdout.strip(), f"importing {entry.value} imports {done.stdout.strip()}: do so inside the hooks"

    def test_the_config_round_trips(self, config: StrictModel) -> None:
        again = type(config).parse(json.loads(config.model_dump_json()))
        assert again == config, "a config that is written out and read again is another one"

    def test_the_config_names_its_plugin(self, config: StrictModel) -> None:
        key = "method" if "method" in type(config).model_fields else "type"
        assert getattr(config, key) == self.name, f"the default of {key} must be the entry point's name"

    def test_an_unknown_key_is_refused_with_a_suggestion(self, config: StrictModel) -> None:
        key = max(type(config).allowed_keys(), key=len)
        misspelt = key[:-1]
        with pytest.raises(ConfigError) as caught:
            type(config).parse({**self.options, misspelt: None})
        (problem,) = [problem for problem in caught.value.problems if problem.path == misspelt]
        assert key in problem.fix, f"{misspelt!r} is refused, and the fix does not name {key!r}: {problem.fix!r}"

    def test_the_config_has_a_json_schema(self, config: StrictModel) -> None:
        schema = type(config).model_json_schema()
        assert set(schema["properties"]) == set(type(config).allowed_keys())
        assert schema["additionalProperties"] is False
