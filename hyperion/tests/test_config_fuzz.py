"""Whatever is written into a config: it is read, or refused with what, why and fix; never a traceback, never a hang.

The same inputs every time, so that CI needs no luck; `HYPERION_FUZZ=long` draws new ones, and many more. What was
found this way has a test of its own name in test_config_faults.py.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hyperion_core.config_file import ConfigFile, read_config_file
from hyperion_core.errors import ConfigError, HyperionError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperion.config import DatasetConfig, FinetuneConfig
from hyperion.planning import Planned, make_plan
from hyperion.training_config import TrainingConfig
from hyperion_adapters_ia3 import IA3Config
from hyperion_adapters_lora import LoraConfig

LONG = os.environ.get("HYPERION_FUZZ") == "long"


def examples(count: int) -> settings:
    return settings(
        max_examples=20 * count if LONG else count,
        derandomize=not LONG,
        database=None,
        deadline=None,  # machines differ; what could take long is bounded by size, and has its own test
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def judged(call: Callable[[], Any]) -> Any:
    """What `call` gives; None when it refuses, as it should."""
    try:
        return call()
    except HyperionError as refusal:
        error = refusal
    assert error.exit_code == 2
    text = str(error)
    assert all(char == "\n" or char.isprintable() for char in text), ascii(text)
    problems = error.problems if isinstance(error, ConfigError) else [error]
    assert not [problem for problem in problems if not (problem.what and problem.why and problem.fix)]
    return None


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


WORDS = ["true", "no", "null", "~", "0100", "1:30", "2e-4", ".inf", "nan", "2026-01-31", "<<", "&a", "*a", "!!binary x"]
anything_written = st.text(st.characters(), max_size=40) | st.sampled_from(WORDS)
numbers = st.integers() | st.integers(10**17, 10**500) | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 1e308])
scalars = (
    st.none() | st.booleans() | numbers | anything_written | st.sampled_from(["lora", "cosine", "sft", "adamw_torch"])
)
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(anything_written, inner, max_size=4),
    max_leaves=8,
)
only_python = st.binary(max_size=9) | st.dates() | st.tuples(st.integers()) | st.just(object()) | st.sets(st.integers())


def keys(*models: type[Any]) -> st.SearchStrategy[str]:
    known = sorted({key for model in models for key in model.allowed_keys()})
    return st.sampled_from(known) | st.sampled_from(known).map(lambda key: key[:-1]) | anything_written


def section(values: st.SearchStrategy[Any], *models: type[Any], **fixed: Any) -> st.SearchStrategy[Any]:
    """A mapping as the models have it: a few keys of theirs, some of them misspelt, with any value."""
    return st.dictionaries(keys(*models), values, max_size=5).map(lambda drawn: {**fixed, **drawn}) | values


def configs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A config that is right, with some of its sections and keys replaced."""
    right: dict[str, Any] = {"base_model": "owner/model", "adapter": {"type": "lora"}, "dataset": "rows.jsonl"}
    sections = st.fixed_dictionaries(
        {},
        optional={
            "adapter": section(values, LoraConfig, IA3Config, type="lora"),
            "dataset": section(values, DatasetConfig, dataset="rows.jsonl"),
            "training": section(values, TrainingConfig),
            "objective": st.just({"type": "sft"}) | values,
            "quantization": section(values, DatasetConfig) | st.just({"bits": 4}),
            "plugins": st.lists(values, max_size=2) | values,
            "new_tokens": st.lists(values, max_size=3),
        },
    )
    stray = st.dictionaries(keys(FinetuneConfig), values, max_size=2)
    return st.builds(lambda some, more: {**right, **more, **some}, sections, stray)


large = st.sampled_from([10**9, 2**31 - 1, 10**18, 10**300, 1e300])
KINDS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-1, 64) | large,
    float: st.floats(0, 2) | large,
    str: st.sampled_from(["a", "q_proj", ".*", "linear", "adamw_torch", "none"]) | anything_written,
}


def fitting(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field's own kind, within its bounds or not."""
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    if typing.get_origin(annotation) is list:
        return st.lists(fitting(inner[0]), max_size=2)
    if typing.get_origin(annotation) is dict:
        return st.dictionaries(KINDS[str], fitting(inner[1]), max_size=1)
    if inner:  # a union, or Annotated, whose other arguments are bounds
        return st.one_of(*(fitting(each) for each in inner if isinstance(each, type) or typing.get_origin(each)))
    return KINDS.get(annotation, scalars)


def settings_of(model: type[Any], most: int, **fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A section of a few real keys, each with a value of its kind."""
    known = [key for key in model.allowed_keys() if key not in fixed]
    pairs = st.sampled_from(known).flatmap(
        lambda key: st.tuples(st.just(key), fitting(model.model_fields[key].annotation))
    )
    return st.lists(pairs, max_size=most).map(lambda drawn: {**fixed, **dict(drawn)})


likely = st.fixed_dictionaries(
    {
        "adapter": settings_of(LoraConfig, 2, type="lora") | settings_of(IA3Config, 2, type="ia3"),
        "dataset": settings_of(DatasetConfig, 2, dataset="rows.jsonl"),
        "training": settings_of(TrainingConfig, 3),
    }
)


@examples(300)
@given(content=st.binary(max_size=600) | anything_written.map(encoded), suffix=st.sampled_from([".yaml", ".json"]))
def test_any_bytes_are_a_config_file_or_none(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"config{suffix}"
    path.write_bytes(content)
    read = judged(lambda: read_config_file(path))
    assert read is None or isinstance(read, ConfigFile)


@examples(200)
@given(data=st.dictionaries(anything_written, nested, max_size=6))
def test_what_json_writes_is_read_as_it_was_meant(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    try:
        path.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
    except ValueError:  # a number that JSON does not have, or of more digits than Python prints
        return
    read = judged(lambda: read_config_file(path))
    if read is not None:
        assert json.dumps(read.data) == json.dumps(data)


@examples(200)
@given(
    data=configs(nested), at=st.integers(0, 10**6), junk=st.binary(max_size=3), style=st.sampled_from(["yaml", "json"])
)
def test_a_config_with_a_scratch_is_read_or_refused(
    data: Any, at: int, junk: bytes, style: str, tmp_path: Path
) -> None:
    try:
        text = json.dumps(data) if style == "json" else yaml.safe_dump(data, allow_unicode=True)
        content = text.encode()
    except ValueError:  # a number of more digits than Python prints
        return
    at %= len(content) + 1
    path = tmp_path / f"config.{style}"
    path.write_bytes(content[:at] + junk + content[at + len(junk) // 2 :])
    read = judged(lambda: FinetuneConfig.from_file(path))
    assert read is None or isinstance(read, FinetuneConfig)


@examples(400)
@given(data=configs(nested | only_python) | nested | only_python)
def test_any_data_is_a_config_or_none(data: Any) -> None:
    config = judged(lambda: FinetuneConfig.parse(data))
    if config is not None:
        assert FinetuneConfig.parse(config.as_data()) == config


@examples(150)
@given(data=likely)
def test_what_is_accepted_can_be_planned_or_is_refused_then(data: Any, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 and 1", "completion": "2"}\n' * 5, encoding="utf-8")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**data, "base_model": str(tiny_model)}), encoding="utf-8")
    planned = judged(lambda: make_plan(FinetuneConfig.from_file(path), device="cpu"))
    assert planned is None or isinstance(planned, Planned)


pytestmark = [pytest.mark.no_cover, *([pytest.mark.slow] if LONG else [])]
