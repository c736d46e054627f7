"""Each way in which a plugin can be broken, all installed at once: the doctor names each, and whose it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hyperion_core.testing.fixtures import FakeDistributions

SCHEDULER = """
from hyperion_core.config import PluginConfig
from hyperion_core.kinds import Scheduler

class Config(PluginConfig):
    type: str = "{name}"

class Fake(Scheduler):
    config_class = Config
    def scheduler_build(self, config, optimizer, horizons): ...
"""
CONFIG = "from pydantic import ConfigDict\n" + SCHEDULER

# name: (source of its module, what the doctor says of it, further words of why or fix)
FAULTS: dict[str, tuple[str, str, str]] = {
    "raises": ("raise RuntimeError('boom')", "is broken", "boom ("),
    "syntax": ("def (", "is broken", "SyntaxError"),
    "exits": ("import sys; sys.exit(0)", "is broken", "SystemExit: 0"),
    "interrupts": ("raise KeyboardInterrupt", "importing the scheduler", "KeyboardInterrupt"),
    "leaves": ("import os; os._exit(0)", "ends the process: importing it left with exit code 0", ""),
    "crashes": ("import ctypes\nctypes.string_at(0)", "crashes Python", "fake_crashes.py:2"),
    "hangs": ("import time\n\ntime.sleep(1000)", "hangs: importing it did not end within 2 s", "fake_hangs.py:3"),
    "spins": ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", "hangs: importing", "--timeout"),
    "asks": ("input()", "is broken", "EOFError"),
    "chatters": (SCHEDULER + "for _ in range(4000): print('x' * 1000)", "prints while it is imported: 4,004,000", ""),
    "sleepy": (SCHEDULER + "import time; time.sleep(1.2)", "is slow to import: 1.", ""),
    "heavy": (SCHEDULER + "import accelerate", "imports accelerate when it is imported", "fake_heavy.py:11"),
    "heavy-when-made": (
        SCHEDULER + "    def __init__(self):\n        import accelerate", "imports accelerate when", "inside the hooks",
    ),
    "framework": (SCHEDULER + "import hyperion", "imports the framework: hyperion", "hyperion_core in its place"),
    "no-class": ("Fake = 7", "is not a scheduler", "derived from hyperion_core.kinds.Scheduler"),
    "adapter": ("from hyperion_core.kinds import Adapter\nclass Fake(Adapter): ...", "is not a scheduler", "derived"),
    "absent": ("", "is broken", "has no attribute 'Fake'"),
    "hookless": (
        "from hyperion_core.kinds import Scheduler\nclass Fake(Scheduler): ...", "lacks the hook scheduler_build",
        "add a method scheduler_build(self, config, optimizer, horizons)",
    ),
    "newer": (SCHEDULER + "    def scheduler_frobnicate(self): ...", "does not know: scheduler_frobnicate", "too new"),
    "misspelt": (SCHEDULER + "    def schedular_check(self): ...", "the misspelt hook scheduler_check", "rename"),
    "stranger": (SCHEDULER + "    def adapter_save(self): ...", "implements adapter_save, a hook of", "observer"),
    "unfit": (SCHEDULER + "    def scheduler_check(self, cfg): ...", "that scheduler_check does not have", "cfg"),
    "default": (SCHEDULER + "    def scheduler_check(self, config=1): ...", "with a default", "give it no default"),
    "lax": (
        CONFIG + "Config.model_config['extra'] = 'ignore'", "a config class that is not strict", "extra='ignore'",
    ),
    "config-of-none": (SCHEDULER + "    config_class = dict", "a config class that is none: dict", "PluginConfig"),
    "other-name": (SCHEDULER.replace("{name}", "cosine"), "names another plugin: Config", "'cosine'"),
    "unmade": (SCHEDULER + "    def __init__(self): raise OSError('no')", "making the scheduler", "OSError: no"),
    "wants": (SCHEDULER + "    def __init__(self, size): ...", "making the scheduler", "missing 1 required positional"),
    "stuck": (SCHEDULER + "    def __init__(self):\n        while True: ...", "hangs: making it", "stuck.py:12"),
    "hidden": ("import no_such_library.part", 'needs the module "no_such_library"', "python -m pip install"),
}  # fmt: skip
METADATA: dict[str, tuple[list[str], str, str]] = {
    "old": (["hyperion-core<1"], "built for another contract", "hyperion-core<1"),
    "silent": (["pluggy"], "built for another contract", "does not say"),
    "lacking": (["hyperion-core>=1", "no-such-library>=2"], "lacks a requirement", "no-such-library>=2"),
}
# Sound, if odd: none may be accused, and none may hold up the others.
SOUND = {
    "plain": SCHEDULER,
    "threads": SCHEDULER + "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()",
    "spawns": SCHEDULER
    + "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1, stderr=-3)",
    "at-exit": SCHEDULER + "import atexit, time; atexit.register(time.sleep, 600)",
}


LIBRARIES = ("accelerate", "hyperion")  # that faults import: empty modules beside them


def write(fakes: FakeDistributions, name: str, source: str, requires: list[str] | None = None) -> None:
    module = "fake_" + name.replace("-", "_")
    fakes(
        f"acme-{name}",
        {"hyperion.schedulers": {name: f"{module}:Fake"}},
        {
            module: source.replace("{name}", name),
            **{each: "" for each in LIBRARIES if f"import {each}\n" in source + "\n"},
        },
        requires=requires or ["hyperion-core>=1,<2"],
    )


def doctor(fakes: FakeDistributions, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = [*map(str, fakes.folders), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.run(
        [sys.executable, "-m", "hyperion_core.doctor", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        cwd=fakes.root,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The doctor's answer with every fault installed at once: by distribution, each one's state and findings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        fakes = FakeDistributions(tmp_path_factory.mktemp("broken"))
        for name, (source, *_) in FAULTS.items():
            write(fakes, name, source)
        for name, (requires, *_) in METADATA.items():
            write(fakes, name, "raise SystemExit(9)", requires)
        for name, source in SOUND.items():
            write(fakes, name, source)
        for owner in ("acme-one", "acme-two"):
            module = owner.replace("-", "_")
            fakes(
                owner,
                {"hyperion.schedulers": {"same": f"{module}:Fake"}},
                {module: SCHEDULER.replace("{name}", "same")},
            )
        names = [f"acme-{name}:{name}" for name in (*FAULTS, *METADATA, *SOUND)] + ["same"]
        done = doctor(fakes, "--json", "--timeout", "2", *names)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    answer["by_owner"] = {each["distribution"]: each for each in answer["plugins"]}
    assert len(answer["by_owner"]) == len(names) + 1
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTS, *METADATA])
def test_each_fault_is_named_with_its_owner(name: str, diagnosis: Any) -> None:
    _, what, detail = {**FAULTS, **METADATA}[name]
    found = diagnosis["by_owner"][f"acme-{name}"]
    (finding,) = found["findings"]
    assert what in finding["what"]
    assert f'the scheduler "{name}" of acme-{name} 1.0' in finding["what"]
    assert detail in finding["what"] + finding["why"] + finding["fix"]
    assert finding["fix"], "what can the user do?"
    assert "stevedore" not in finding["why"] and "hyperion_core/" not in finding["why"], "the plugin's place, not ours"
    assert found["state"] == ("warning" if name in ("chatters", "framework", "sleepy") else "problem")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_plugin_is_not_accused(name: str, diagnosis: Any) -> None:
    found = diagnosis["by_owner"][f"acme-{name}"]
    assert found["findings"] == []
    assert found["heavy"] == []
    assert found["seconds"] < 2


@pytest.mark.slow
def test_owners_of_one_name_are_named(diagnosis: Any) -> None:
    for owner in ("acme-one", "acme-two"):
        (finding,) = diagnosis["by_owner"][owner]["findings"]
        assert "acme-one 1.0 and acme-two 1.0" in finding["what"]


def test_all_faults_of_one_plugin_are_told_at_once(fake_dist) -> None:
    write(fake_dist, "many", SCHEDULER.replace('"{name}"', '"other"') + """
    def __init__(self): raise OSError("no disk")
    def scheduler_frobnicate(self): ...
    def scheduler_check(self, confg, horizon=None): ...
""")  # fmt: skip
    done = doctor(fake_dist, "many")
    assert done.returncode == 1
    for fault in ("frobnicate", "confg", "with a default", "names another plugin", "no disk"):
        assert fault in done.stdout


def test_a_sound_plugin_is_well_and_an_unknown_one_is_not_there(fake_dist) -> None:
    write(fake_dist, "plain", SCHEDULER)
    done = doctor(fake_dist, "plain", "--json")
    answer = json.loads(done.stdout)
    assert [each["state"] for each in answer["plugins"]] == ["ok"]
    done = doctor(fake_dist, "plian")
    assert done.returncode == 2
    assert 'did you mean "plain"?' in done.stderr
