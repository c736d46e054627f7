"""What every suite inherits: each check names the fault of a plugin that is installed and broken. Needs no torch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hyperion_core.registry import registry as current_registry
from hyperion_core.testing import PluginConformance
from hyperion_core.testing.fixtures import FakeDistributions

SOURCE = """
from hyperion_core.config import PluginConfig
from hyperion_core.kinds import Scheduler

class Config(PluginConfig):
    type: str = "warm"
    power: float = 1.0

class Warm(Scheduler):
    config_class = Config
    def scheduler_build(self): ...
"""


class Suite(PluginConformance):
    kind = "scheduler"
    plugin = "warm"


def importing(module: str) -> str:
    return f"import {module}\n{SOURCE}"


def config_with(*lines: str) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return SOURCE.replace("    power: float = 1.0\n", f"    power: float = 1.0\n{body}\n")


DOUBLED = config_with(
    "from pydantic import field_serializer",
    "@field_serializer('power')",
    "def doubled(self, value): return 2 * value",
)
WORDS = DOUBLED.replace("2 * value", "f'power {value}'")
LOOSE = config_with("model_config = {'extra': 'ignore'}")
SILENT = config_with(
    "@classmethod",
    "def contradictions(cls, data):",
    "    from hyperion_core.errors import Problem",
    "    return [Problem(key, 'no') for key in data if key not in cls.model_fields]",
)
SECRETIVE = config_with("model_config = {'json_schema_extra': lambda schema: schema['properties'].pop('power')}")
INVITING = config_with("model_config = {'json_schema_extra': lambda schema: schema.pop('additionalProperties')}")

LIGHT = "test_importing_the_plugin_is_light"
ALONE = "test_importing_the_plugin_leaves_the_framework_out"
ROUND_TRIP = "test_the_config_round_trips"
NAME = "test_the_config_names_its_plugin"
UNKNOWN = "test_an_unknown_key_is_refused_with_a_suggestion"
SCHEMA = "test_the_config_has_a_json_schema"

BROKEN = [
    (importing("accelerate"), LIGHT, "importing acme_warm imports accelerate: do so inside the hooks"),
    (importing("acme_no_such_module"), LIGHT, "importing acme_warm fails in a fresh Python: .*acme_no_such_module"),
    (importing("hyperion"), ALONE, "importing acme_warm imports hyperion: import hyperion_core only"),
    (DOUBLED, ROUND_TRIP, "a config that is written out and read again is another one"),
    (WORDS, ROUND_TRIP, "a config that is written out cannot be read again: .*power"),
    (SOURCE.replace('"warm"', '"warmer"'), NAME, "the default of type must be the entry point's name"),
    (LOOSE, UNKNOWN, "the unknown key 'powe' is not refused: keep the config strict"),
    (SILENT, UNKNOWN, "'powe' is refused, and no fix names 'power'"),
    (SECRETIVE, SCHEMA, r"the JSON schema of the config lacks options that it takes: \['power'\]"),
    (INVITING, SCHEMA, "the JSON schema of the config lets unknown options pass"),
]


def check(fake_dist: FakeDistributions, source: str, test: str) -> None:
    """Install the plugin, and beside it stand-ins for what it may not import; run one check of the suite on it."""
    modules = {"acme_warm": source, "accelerate": "", "hyperion": ""}
    fake_dist("acme-warm", {"hyperion.schedulers": {"warm": "acme_warm:Warm"}}, modules)
    available: dict[str, Any] = {}
    method = getattr(Suite(), test)
    if "config" in inspect.signature(method).parameters:
        available["config"] = current_registry().load("scheduler", "acme-warm:warm").config_class()
    method(**available)


@pytest.mark.parametrize("source, test, message", BROKEN, ids=[f"{t}-{m[:30]}" for _, t, m in BROKEN])
def test_a_broken_plugin_is_caught(fake_dist: FakeDistributions, source: str, test: str, message: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s){message}"):
        check(fake_dist, source, test)


@pytest.mark.parametrize("test", [LIGHT, ALONE, ROUND_TRIP, NAME, UNKNOWN, SCHEMA])
def test_a_sound_plugin_passes(fake_dist: FakeDistributions, test: str) -> None:
    check(fake_dist, SOURCE, test)
