"""The reference is written from the code: nothing of the code is missing in it, or stands there undescribed.

What a page of the reference says is held against the command line, the schema, the specifications and the modules
themselves, not against the generators' own lists.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.hooks import ALL_HOOKS
from hyperion_core.kinds import KINDS
from hyperion_core.specs import required_hooks
from hyperion_docs import GENERATORS, MARK, commands, configuration, conformance, filled, hooks, names

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Pages of the reference as a reader gets them, by the name of their generator."""
    texts = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    return {mark: filled(text) for text in texts for mark in MARK.findall(text)}


def test_every_generator_has_its_page(pages: dict[str, str]) -> None:
    assert set(pages) == set(GENERATORS)


# --- commands ---


def test_every_command_and_option_is_there_and_described(cli: Any, pages: dict[str, str]) -> None:
    """What `--help` shows of each command, asked of the command line itself."""
    waiting, seen = [[]], []
    while waiting:
        words = waiting.pop()
        shown = cli(*words, "--help").stdout
        seen.append(" ".join(["hyperion", *words]))
        for option in re.findall(r"(--[a-z][\w-]*)", shown.partition("Usage:")[2]):
            if option != "--help":
                assert f"`{option}" in pages["commands"] or f", {option}" in pages["commands"], (words, option)
        below = shown.partition(" Commands ")[2]
        waiting += [[*words, name] for name in re.findall(r"^│ (\w[\w-]*) ", below, re.MULTILINE)]
    assert len(seen) > 5
    headings = set(re.findall(r"^## (.+)$", pages["commands"], re.MULTILINE))
    assert headings >= {name for name in seen if name not in groups_without_options()}
    for name, command in commands.commands():
        assert commands.described(command), f"{name} has no description"
        for parameter in commands.parameters(command):
            assert getattr(parameter, "help", ""), f"{parameter.name} of {name} has no description"


def groups_without_options() -> set[str]:
    return {"hyperion plugins", "hyperion data"}


# --- config keys ---


def test_every_config_key_is_there_and_described(pages: dict[str, str]) -> None:
    """Every property of the JSON Schema, that of each installed plugin included."""
    from hyperion.schema import config_schema

    schema = config_schema()
    models = {"": schema, **{name: model for name, model in schema["$defs"].items() if "properties" in model}}
    assert {"adapter:lora", "adapter:ia3", "scheduler:cosine", "objective:sft", "TrainingConfig"} <= set(models)
    for model, found in models.items():
        for key in found["properties"]:
            assert re.search(rf"^\| `{re.escape(key)}` \|", pages["configuration"], re.MULTILINE), (model, key)
    for kind_and_name in (name for name in models if ":" in name):
        assert re.search(
            rf"^## .*: {re.escape(kind_and_name.partition(':')[2])}`$", pages["configuration"], re.MULTILINE
        )
    for section in configuration.sections():
        bare = [key.name for key in configuration.keys(section.model) if not key.description]
        assert not bare, f"{section.title}: no description of {bare}"


def test_every_training_argument_is_there_as_taken_or_as_refused(pages: dict[str, str]) -> None:
    from hyperion_core.foreign import foreign_fields

    for name in foreign_fields("transformers", "training_args.py", "TrainingArguments"):
        assert f"| `{name}` |" in pages["configuration"], name
    assert all(why and fix for why, fix in configuration.refused().values())


# --- hooks ---


def test_every_hook_is_there_with_its_signature_and_star(pages: dict[str, str]) -> None:
    required = {name for kind in KINDS for name in required_hooks(kind.hooks)}
    for name, specs in ALL_HOOKS.items():
        heading = f"### {name}{' ★' if name in required else ''}\n"
        assert heading in pages["hooks"], name
        signature = pages["hooks"].partition(heading)[2].partition("```python")[2].partition("```")[0]
        for parameter in list(inspect.signature(getattr(specs, name)).parameters)[1:]:
            assert re.search(rf"\b{parameter}:", signature), f"{name} lacks {parameter}"
    assert not [hook.name for kind in KINDS for hook in hooks.hooks(kind) if not hook.doc]


# --- audit, conformance and names ---


def test_every_check_of_the_audit_is_there_and_described(pages: dict[str, str]) -> None:
    from hyperion.data.audit import CHECKS

    for name, what in CHECKS.items():
        assert what and f"| `{name}` | {what} |" in pages["audit"], name


def test_every_check_of_every_suite_is_there_and_described(pages: dict[str, str]) -> None:
    from hyperion_core import testing

    for suite in (name for name in dir(testing) if name.endswith("Conformance")):
        assert f"## {suite}\n" in pages["conformance"]
        for check in conformance.checks(getattr(testing, suite)):
            assert check.doc, f"{suite}.{check.name} does not say what it promises"
            assert f"| {check.name.removeprefix('test_').replace('_', ' ')} |" in pages["conformance"]


def test_every_public_name_is_there_and_described(pages: dict[str, str]) -> None:
    import hyperion
    import hyperion.data

    public = [f"hyperion.{name}" for name in dir(hyperion) if not name.startswith("_")]
    public += [f"hyperion.data.{name}" for name in hyperion.data.__all__]
    for module in names.CORE_MODULES:
        tree = vars(importlib.import_module(module))
        public += [
            f"{module}.{name}"
            for name, value in tree.items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module and callable(value)
        ]
    assert {"hyperion.Trainer", "hyperion.LoraConfig", "hyperion_core.facts.Cost"} <= set(public)
    missing = [name for name in public if f" {name}\n" not in pages["names"]]
    assert not missing
    bare = [name for name, value in names.everything().items() if not inspect.getdoc(value)]
    assert not bare, f"no docstring: {bare}"


def test_every_module_that_plugins_import_is_there() -> None:
    """What first-party plugins and templates import of the core, others will too."""
    root = DOCS.parent
    sources = [*root.glob("hyperion_[aq]*/src/**/*.py"), *root.glob("plugins/*/src/**/*.py")]
    sources += root.glob("hyperion/src/hyperion/plugin_templates/**/*.py")
    imported = {
        module
        for path in sources
        for module in re.findall(r"from (hyperion_core\.\w+) import", path.read_text("utf-8"))
    }
    assert imported - {"hyperion_core.testing"} <= {*names.CORE_MODULES}


def test_writing_the_reference_imports_nothing_heavy() -> None:
    code = f"""if True:
        import json, sys
        sys.path.insert(0, {str(DOCS / "_ext")!r})
        import hyperion_docs
        for write in hyperion_docs.GENERATORS.values():
            write()
        print(json.dumps([name for name in ("torch", "transformers", "peft", "sphinx") if name in sys.modules]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
