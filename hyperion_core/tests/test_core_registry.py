"""Which plugin is meant, and each way in which it can be wrong: its own error, its own fix, and no needless import."""

from __future__ import annotations

import pytest
from hyperion_core.errors import (
    PluginConflictError,
    PluginContractError,
    PluginHookError,
    PluginLoadError,
    PluginNotFoundError,
    PluginRequirementError,
)
from hyperion_core.kinds import Objective, Scheduler
from hyperion_core.registry import Registry, use
from hyperion_core.registry import registry as registry_in_use

BROKEN = "raise RuntimeError('boom')"


@pytest.fixture
def one(fake_dist, plugin_source):
    """Writes one distribution with one scheduler called "warm"; gives a registry that sees the fakes alone."""

    def write(source=None, name="acme-warm", module="acme_warm", **options):
        source = plugin_source(Scheduler) if source is None else source
        fake_dist(name, {"hyperion.schedulers": {"warm": f"{module}:Fake"}}, {module: source}, **options)
        return fake_dist.registry()

    return write


def test_a_plugin_is_found_with_its_distribution_version_and_origin_and_loaded_alone(one, fake_dist):
    found = one()
    (entry,) = found.entries("scheduler")
    assert (entry.qualified, entry.whose, entry.origin) == ("acme-warm:warm", "acme-warm 1.0", "index")
    assert found.state(entry) == "ok"
    assert fake_dist.imported() == []
    plugin = found.load("scheduler", "warm")
    assert issubclass(plugin, Scheduler) and fake_dist.imported() == ["acme_warm"]
    assert found.load("scheduler", "acme-warm:warm") is plugin


def test_conflict_names_both_and_how_to_choose_before_any_import(kind, fake_dist, plugin_source):
    for owner in ("acme", "bolt"):
        fake_dist(f"{owner}-x", {kind.group: {"same": f"{owner}_x:Fake"}}, {f"{owner}_x": plugin_source(kind)})
    found = fake_dist.registry()
    with pytest.raises(PluginConflictError) as caught:
        found.load(kind.kind, "same")
    assert "acme-x 1.0 and bolt-x 1.0" in caught.value.what
    assert caught.value.fix == 'say whose you mean: "acme-x:same" or "bolt-x:same"'
    assert {found.state(entry) for entry in found.entries(kind.kind)} == {"conflict"}
    assert fake_dist.imported() == []

    assert found.load(kind.kind, "bolt-x:same").__module__ == "bolt_x"
    assert found.load(kind.kind, "Bolt_X:same").__module__ == "bolt_x"
    assert fake_dist.imported() == ["bolt_x"]


def test_a_missing_plugin_with_a_close_name_gets_a_suggestion(one):
    with pytest.raises(PluginNotFoundError) as caught:
        one().load("scheduler", "wram")
    assert caught.value.fix == 'did you mean "warm"?'
    assert caught.value.why == "installed: warm"


def test_a_missing_plugin_of_a_named_distribution(one):
    found = one()
    with pytest.raises(PluginNotFoundError) as caught:
        found.load("scheduler", "acme-warm:wram")
    assert caught.value.fix == 'did you mean "acme-warm:warm"?'
    with pytest.raises(PluginNotFoundError) as caught:
        found.load("scheduler", "zebra:hot")
    assert caught.value.fix == "python -m pip install zebra"


@pytest.mark.parametrize(
    "name, fix",
    [
        ("two_bits", 'python -m pip install "hyperion-ft[two_bits]"'),
        ("bnb", "install the distribution that offers it, then see `hyperion plugins list`"),
    ],
)
def test_a_missing_plugin_with_no_close_name_names_an_extra_that_exists(registry, fake_dist, name, fix):
    metadata = "Metadata-Version: 2.4\nName: hyperion-ft\nVersion: 1\nProvides-Extra: dev\nProvides-Extra: Two-Bits"
    fake_dist("hyperion-ft", {}, {}, files={"METADATA": metadata})
    with pytest.raises(PluginNotFoundError) as caught:
        registry.load("quantizer", name)
    assert caught.value.why == "no quantizer is installed at all"
    assert caught.value.fix == fix


def test_a_broken_plugin_that_is_asked_for_is_a_load_error_with_its_cause(one):
    found = one(BROKEN)
    with pytest.raises(PluginLoadError) as caught:
        found.load("scheduler", "warm")
    assert "acme-warm 1.0 is broken" in caught.value.what
    assert "RuntimeError: boom" in caught.value.why
    assert "--force-reinstall acme-warm" in caught.value.fix
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_entry_point_to_nothing_is_a_load_error(one):
    with pytest.raises(PluginLoadError, match="is broken") as caught:
        one("x = 1").load("scheduler", "warm")
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_broken_plugin_that_nobody_asked_for_breaks_nothing(one, fake_dist, plugin_source):
    one(BROKEN)
    fake_dist("bolt-cold", {"hyperion.schedulers": {"cold": "bolt_cold:Fake"}}, {"bolt_cold": plugin_source(Scheduler)})
    found = fake_dist.registry()
    assert found.load("scheduler", "cold").__module__ == "bolt_cold"
    assert {entry.name: found.state(entry) for entry in found.entries()} == {"cold": "ok", "warm": "ok"}
    assert fake_dist.imported() == ["bolt_cold"]


def test_a_requirement_that_the_metadata_names_is_missed_before_import(one, fake_dist):
    found = one(BROKEN, requires=["hyperion-core>=1", "no-such-library>=2", "pluggy>=999", "x; python_version<'3'"])
    with pytest.raises(PluginRequirementError) as caught:
        found.load("scheduler", "warm")
    assert caught.value.fix == 'python -m pip install "no-such-library>=2" "pluggy>=999"'
    assert "no-such-library>=2, pluggy>=999 (" in caught.value.why and "is installed)" in caught.value.why
    assert [found.state(entry) for entry in found.entries()] == ["missing requirement"]
    assert fake_dist.imported() == []


def test_a_plugin_that_exits_while_it_is_imported_does_not_end_the_command_unheard(one):
    with pytest.raises(PluginLoadError, match="is broken") as caught:
        one("import sys; sys.exit('bye')").load("scheduler", "warm")
    assert "SystemExit: bye" in caught.value.why


def test_a_name_is_looked_up_over_all_kinds(one, fake_dist, plugin_source):
    one()
    fake_dist("bolt", {Objective.group: {"warm": "bolt:Fake"}}, {"bolt": plugin_source(Objective)})
    found = fake_dist.registry()
    assert [entry.kind for entry in found.named("warm")] == ["scheduler", "objective"]
    assert [entry.distribution for entry in found.named("bolt:warm")] == ["bolt"]
    assert [entry.kind for entry in found.named("warm", "objective")] == ["objective"]
    with pytest.raises(PluginNotFoundError, match='a plugin called "wram"') as caught:
        found.named("wram")
    assert caught.value.fix == 'did you mean "warm"?'
    with pytest.raises(PluginNotFoundError, match="has an adapter called"):
        found.named("warm", "adapter")


def test_a_requirement_that_the_metadata_hides_is_missed_by_import(one):
    with pytest.raises(PluginRequirementError) as caught:
        one("import no_such_library.part").load("scheduler", "warm")
    assert 'needs the module "no_such_library"' in caught.value.what
    assert caught.value.fix.startswith("python -m pip install no_such_library,")
    assert "acme-warm" in caught.value.fix
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_plugin_that_explains_itself_while_it_is_imported_is_heard(one):
    source = "from hyperion_core.foreign import foreign_fields\nforeign_fields('no_such_library', 'a.py', 'A')"
    with pytest.raises(PluginRequirementError) as caught:
        one(source).load("scheduler", "warm")
    assert caught.value.fix == "python -m pip install no_such_library"


def test_a_plugin_without_its_own_module_is_broken_not_lacking(one):
    with pytest.raises(PluginLoadError):
        one(module="acme_warm", source="import acme_warm.part").load("scheduler", "warm")


@pytest.mark.parametrize("asked", [">=2", "<1", "==0.9", "~=2.1"])
def test_another_contract_is_refused_before_import(one, fake_dist, asked):
    found = one(BROKEN, requires=[f"hyperion-core{asked}"])
    with pytest.raises(PluginContractError) as caught:
        found.load("scheduler", "warm")
    assert f"hyperion-core{asked}" in caught.value.why and "1.0.0 is installed" in caught.value.why
    assert caught.value.fix == "python -m pip install --upgrade acme-warm"
    assert [found.state(entry) for entry in found.entries()] == ["wrong contract"]
    assert fake_dist.imported() == []


def test_a_contract_that_is_not_declared_is_refused_before_import(one, fake_dist):
    with pytest.raises(PluginContractError) as caught:
        one(BROKEN, requires=["pluggy"]).load("scheduler", "warm")
    assert caught.value.fix == 'its authors must add "hyperion-core>=1" to its dependencies'
    assert fake_dist.imported() == []


@pytest.mark.parametrize(
    "source, is_what",
    [
        ("class Fake: pass", "the class Fake"),
        ("def Fake(): pass", "a function"),
        ("from hyperion_core.kinds import Adapter\nclass Fake(Adapter): pass", "the class Fake"),
    ],
)
def test_an_entry_point_must_be_a_class_of_its_kind(one, source, is_what):
    with pytest.raises(PluginLoadError) as caught:
        one(source).load("scheduler", "warm")
    assert caught.value.what.endswith(f"acme_warm:Fake is {is_what}")
    assert "hyperion_core.kinds.Scheduler" in caught.value.why


def test_hooks_are_checked_when_a_plugin_is_loaded(one):
    with pytest.raises(PluginHookError, match="lacks the hook scheduler_build"):
        one("from hyperion_core.kinds import Scheduler\nclass Fake(Scheduler): pass").load("scheduler", "warm")


def test_a_public_name_lives_in_a_plugin(fake_dist):
    fake_dist(
        "acme-warm", {"hyperion.exports": {"WarmConfig": "acme_warm:WarmConfig"}}, {"acme_warm": "WarmConfig = 7"}
    )
    assert fake_dist.registry().exported("WarmConfig") == 7
    with pytest.raises(PluginNotFoundError, match="WramConfig") as caught:
        fake_dist.registry().exported("WramConfig")
    assert caught.value.fix == 'did you mean "WarmConfig"?'


def test_a_public_name_that_two_offer_is_imported_from_its_own_module(fake_dist):
    for owner in ("acme", "bolt"):
        fake_dist(f"{owner}-warm", {"hyperion.exports": {"WarmConfig": f"{owner}_warm.parts:WarmConfig"}}, {})
    with pytest.raises(PluginConflictError) as caught:
        fake_dist.registry().exported("WarmConfig")
    assert caught.value.fix == "import it from its own module: " + " or ".join(
        f"from {owner}_warm.parts import WarmConfig" for owner in ("acme", "bolt")
    )


def test_a_class_can_be_registered_in_process(registry):
    class Plain(Objective):
        def objective_sequences(self, config, row): ...
        def objective_loss(self, config, logps): ...

    registry.add(Plain, "plain")
    (entry,) = registry.entries()
    assert (entry.origin, entry.qualified) == ("in process", "in-process:plain")
    assert registry_in_use() is registry
    assert registry_in_use().load("objective", "plain") is Plain

    class Lacking(Objective): ...

    with pytest.raises(PluginHookError, match="lacks the hook objective_sequences"):
        registry.add(Lacking, "lacking")
    assert len(registry.entries()) == 1


def test_the_registry_is_discovered_once_and_again_when_told(monkeypatch):
    before = use(None)
    try:
        made = []
        monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, path=None: made.append(1) or cls()))
        assert registry_in_use() is registry_in_use()
        assert made == [1]
        use(None)
        registry_in_use()
        assert made == [1, 1]
    finally:
        use(before)


def test_a_plugin_that_cannot_be_made_is_named(registry):
    class Wants(Scheduler):
        def __init__(self, something):
            self.something = something

        def scheduler_build(self, config, optimizer, horizons): ...

    registry.add(Wants, "wants")
    with pytest.raises(PluginLoadError, match='the scheduler "wants" of in-process 0 cannot be made') as caught:
        registry.create("scheduler", "wants")
    assert "TypeError" in caught.value.why and "without arguments" in caught.value.fix
