"""`hyperion plugins info` and `doctor`, as a user types them, with sound and with broken plugins."""

from __future__ import annotations

import json

import pytest
import yaml
from hyperion_core.doctor import examine
from hyperion_core.registry import registry

from hyperion import FinetuneConfig
from hyperion.snippet import config_snippet

LINEAR = """
from hyperion_core.config import AdapterConfig
from hyperion_core.kinds import Adapter
from pydantic import Field

class LinearConfig(AdapterConfig):
    type: str = "linear"
    rank: int = Field(description="How many.")
    mode: str | None = Field("plain", description="[bold]As it is.[/bold]")

class Linear(Adapter):
    '''A straight one. And more.'''
    config_class = LinearConfig
    def adapter_targets(self, config, model): ...
"""
METADATA = """\
Metadata-Version: 2.4
Name: acme-linear
Version: 1.0
Summary: Straight lines.
License-Expression: MIT
Project-URL: Homepage, https://acme.example
Requires-Dist: hyperion-core>=1,<2
Requires-Dist: pluggy>=1
"""
ENDINGS = {
    "exits": "import os; os._exit(0)",
    "raises": "raise RuntimeError('[/red] boom')",
    "prints": "print('\\x1b[31mx' * 100_000)\nraise SystemExit(3)",
}


def test_info_tells_all_of_a_plugin(cli) -> None:
    done = cli("plugins", "info", "lora")
    assert done.code == 0, done.stderr
    for text in ("hyperion-adapters-lora 0.1.0", "AGPL-3.0-or-later", "hyperion_adapters_lora:LoraAdapter",
                 "1.0.0 is installed", "mergeable: true", "Rank of the update.", "dict[str, int] | None"):  # fmt: skip
        assert text in done.stdout
    lines = done.stdout.splitlines()
    assert any("peft" in line and "(0." in line for line in lines), "requirements with what is installed"
    assert any(line.startswith("★  adapter_apply") and " yes " in line and "Attach one" in line for line in lines)
    assert any(line.startswith("   adapter_route") and " - " in line for line in lines)


def test_what_info_offers_to_paste_is_valid(cli) -> None:
    shown = cli("plugins", "info", "lora").stdout
    for each in examine(entry for entry in registry().entries() if entry.kind != "export"):
        entry, facts = each.entry, each.facts
        assert facts is not None
        text = config_snippet(entry.kind, entry.name, facts.example, facts.needs)
        for need in facts.needs:
            assert f"# {need}" in text
        if entry.name == "lora":
            assert text in shown
        config = {"base_model": "owner/model", "adapter": "lora", **yaml.safe_load(text)}
        if not facts.needs:
            parsed = FinetuneConfig.parse(config)
            method = parsed.quantization.method if parsed.quantization else None
            assert entry.name in (parsed.adapter.type, parsed.objective.type, parsed.scheduler().type, method)


def test_info_of_a_broken_plugin_shows_its_metadata_and_what_is_wrong(cli, fake_dist) -> None:
    entry_points = {"hyperion.adapters": {"linear": "acme_linear:Linear"}}
    fake_dist("acme-linear", entry_points, {"acme_linear": LINEAR}, files={"METADATA": METADATA})
    done = cli("plugins", "info", "linear", "--kind", "adapter")
    assert done.code == 2, done.stdout
    for text in ("acme-linear 1.0", "MIT", "Straight lines.", "https://acme.example", "A straight one.",
                 "pluggy>=1  (1.", "problem: ", "lacks the hook adapter_apply", '# "rank" is missing: add it',
                 "[bold]As it is."):  # fmt: skip
        assert text in done.stdout
    assert "And more" not in done.stdout
    both = cli("plugins", "info", "linear")
    assert both.stdout.startswith("adapter linear") and "\nscheduler linear" in both.stdout
    assert [each["kind"] for each in json.loads(cli("plugins", "info", "linear", "--json").stdout)] == [
        "adapter", "scheduler",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_info_survives_a_plugin_that_ends_its_process(name: str, cli, fake_dist) -> None:
    fake_dist("acme", {"hyperion.adapters": {name: "acme_x:X"}}, {"acme_x": ENDINGS[name]})
    done = cli("plugins", "info", name)
    assert done.code == 2
    assert "acme 1.0" in done.stdout and "problem: " in done.stdout
    assert "Traceback" not in done.stderr and "\x1b[31m" not in done.stdout


def test_info_of_nothing_says_what_there_is(cli) -> None:
    done = cli("plugins", "info", "lroa")
    assert done.code == 2
    assert 'did you mean "lora"?' in done.stderr
    assert cli("plugins", "info", "lora", "--kind", "scheduler").code == 2
    assert "no kind of plugin is called" in cli("plugins", "info", "lora", "--kind", "adaptor").stderr


def test_doctor_finds_nothing_wrong_with_what_is_here(cli) -> None:
    done = cli("plugins", "doctor")
    assert done.code == 0, done.stdout
    rows = {tuple(line.split()[:2]): line for line in done.stdout.splitlines() if line.rstrip().endswith("ok")}
    for entry in registry().entries():
        assert entry.whose in rows[entry.kind, entry.name]
    assert done.stdout.endswith("examined: all is well\n")


def test_list_and_doctor_work_with_every_plugin_broken(cli, fake_dist) -> None:
    """All that is installed is broken: first-party entry points are hidden behind broken ones of the same name."""
    found = registry().entries()
    for owner in {entry.distribution for entry in found}:
        mine = [entry for entry in found if entry.distribution == owner]
        module = "broken_" + owner.replace("-", "_")
        groups: dict[str, dict[str, str]] = {}
        for entry in mine:
            assert entry.entry_point is not None
            groups.setdefault(entry.entry_point.group, {})[entry.name] = f"{module}:X"
        fake_dist(owner, groups, {module: "import os; os._exit(3)"}, version="9")
    assert cli("--help").code == 0
    listed = cli("plugins", "list", "--json")
    assert {row["version"] for row in json.loads(listed.stdout)} == {"9"}
    done = cli("plugins", "doctor", "--json")
    assert done.code == 1, done.stderr
    states = json.loads(done.stdout)["plugins"]
    assert len(states) == len(found)
    assert {each["state"] for each in states} == {"problem"}
    assert all("exit code 3" in each["findings"][0]["what"] for each in states)


def test_doctor_of_one_plugin_tells_its_fault_and_the_fix(cli, fake_dist) -> None:
    fake_dist("acme", {"hyperion.schedulers": {"x": "acme_x:X"}}, {"acme_x": "raise OSError('[/red] boom')"})
    done = cli("plugins", "doctor", "x")
    assert done.code == 1
    assert 'problem: the scheduler "x" of acme 1.0 is broken' in done.stdout
    assert "OSError: [/red] boom" in done.stdout and "acme_x.py:1" in done.stdout
    assert "  fix: " in done.stdout
    assert "1 problem" in done.stdout.splitlines()[-1]
    assert cli("plugins", "doctor", "y").code == 2
