"""Fields of another library's config are read from its source; nothing of it is imported or evaluated."""

from __future__ import annotations

import sys
from typing import Any, Dict, Literal, Optional, Union  # noqa: UP035

import pytest
from hyperion_core import foreign
from hyperion_core.config import AdapterConfig
from hyperion_core.errors import ConfigError, PluginRequirementError
from hyperion_core.foreign import foreign_fields, foreign_keys, foreign_values, with_foreign_fields

SOURCE = '''
raise RuntimeError("this must never be imported")
from dataclasses import dataclass, field
@dataclass
class Config(Base):
    """A config."""
    r: int = 8
    alpha: float = field(default=0.5, metadata={"help": "How  much\\n of it."})
    targets: Optional[Union[list[str], str]] = field(default=None, metadata={"help": ("Where")})
    mode: Literal["fast", "slow"] = "fast"
    kind: "str | None" = None
    exotic: Optional[Secret] = None
    exotic_origin: Secret[int] = None
    pairs: typing.Dict[str, int] = field(default_factory=dict, metadata=make_help())
    odd: Literal[SOME] = None
    worse: "not an expression(" = None
    shape: tuple[int, ...] = (1,)
    wrong: int[str] = 1
    called: make() = 1
    required: bool
    chosen: int = field(init=False, default=3)
    _private: int = 1
    CONSTANT = 4
    def method(self): ...

class Colour(Enum):
    RED = "red"
    GREEN = "green"

TRACKERS = {"one": One, "two": Two, **more}
'''


def clear_caches():
    for cached in (foreign_fields, foreign_values, foreign_keys, foreign._module):
        cached.cache_clear()


@pytest.fixture
def library(fake_dist):
    fake_dist("foreign-lib", {}, {"foreign_lib/__init__.py": SOURCE, "foreign_lib/part/config.py": SOURCE})
    clear_caches()
    yield
    clear_caches()
    assert not any(name.startswith("foreign_lib") for name in sys.modules)


def test_annotations_defaults_and_help_are_read(library):
    fields = foreign_fields("foreign_lib", "part/config.py", "Config")
    assert {name: field.annotation for name, field in fields.items()} == {
        "r": int,
        "alpha": float,
        "targets": Optional[Union[list[str], str]],  # noqa: UP007, UP045
        "mode": Literal["fast", "slow"],
        "kind": Union[str, None],  # noqa: UP007
        "exotic": Optional[Any],  # noqa: UP045
        "exotic_origin": Any,
        "pairs": Dict[str, int],  # noqa: UP006
        "odd": Any,
        "worse": Any,
        "shape": tuple[int, ...],
        "wrong": Any,
        "called": Any,
        "required": bool,
    }
    assert (fields["r"].default, fields["required"].default) == ("8", None)
    assert (fields["alpha"].default, fields["pairs"].default) == ("0.5", "dict")
    assert (fields["alpha"].help, fields["targets"].help) == ("How much of it.", "Where")
    assert fields["r"].help == fields["pairs"].help == ""


def test_a_model_takes_the_foreign_fields_that_it_does_not_declare(library):
    @with_foreign_fields("foreign_lib", "__init__.py", "Config", leave_out={"worse"})
    class Mine(AdapterConfig):
        """My options."""

        type: str = "mine"
        r: int = 16

    assert (Mine.__name__, Mine.__qualname__.rpartition(".")[2], Mine.__doc__) == ("Mine", "Mine", "My options.")
    assert Mine().given() == {} and Mine().r == 16 and Mine().alpha is None
    assert Mine(alpha=0.25, targets=["q"]).given() == {"alpha": 0.25, "targets": ["q"]}
    assert Mine.model_json_schema()["properties"]["alpha"]["description"] == "How much of it."
    with pytest.raises(ConfigError) as caught:
        Mine(alpah=1, mode="quick", worse=1, _private=2)
    problems = {problem.path: problem for problem in caught.value.problems}
    assert set(problems) == {"alpah", "mode", "worse", "_private"}
    assert problems["alpah"].fix == 'did you mean "alpha"?'


def test_a_library_that_is_not_there(library):
    with pytest.raises(PluginRequirementError) as caught:
        foreign_fields("no_such_library", "config.py", "Config")
    assert caught.value.fix == "python -m pip install no_such_library"


@pytest.mark.parametrize("file, name", [("part/config.py", "Other"), ("part/none.py", "Config")])
def test_a_version_that_has_no_such_class(library, file, name):
    for read in (foreign_fields, foreign_values, foreign_keys):
        with pytest.raises(PluginRequirementError, match=f"the installed foreign_lib has no .*{file}") as caught:
            read("foreign_lib", file, name)
        assert "constraints.txt" in caught.value.fix


def test_the_values_of_an_enum_and_the_keys_of_a_dict(library):
    assert foreign_values("foreign_lib", "__init__.py", "Colour") == ("red", "green")
    assert foreign_keys("foreign_lib", "__init__.py", "TRACKERS") == ("one", "two")


@pytest.mark.parametrize(
    "package, file, name, some",
    [
        ("peft", "tuners/lora/config.py", "LoraConfig", {"r": int, "use_dora": bool}),
        ("transformers", "training_args.py", "TrainingArguments", {"learning_rate": float, "seed": int}),
    ],
)
def test_the_real_libraries_are_read_without_importing_them(package, file, name, some):
    if not any(package in str(path) for path in _installed(package)):
        pytest.skip(f"{package} is not installed")
    before = package in sys.modules
    fields = foreign_fields(package, file, name)
    assert {key: fields[key].annotation for key in some} == some
    assert len(fields) > 20 and (package in sys.modules) is before


def _installed(package):
    import importlib.util

    spec = importlib.util.find_spec(package)
    return spec.submodule_search_locations if spec else []
