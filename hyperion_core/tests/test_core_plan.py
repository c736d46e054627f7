"""A plan is frozen, printable and plain; what is not known is said."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hyperion_core.compatibility import check_pair
from hyperion_core.context import NoProgress, RunContext
from hyperion_core.distributions import PluginEntry
from hyperion_core.facts import Capabilities, MiB, Provides
from hyperion_core.kinds import Adapter, Quantizer
from hyperion_core.plan import Check, Choice, Plan

CHOICE = Choice.of(PluginEntry("adapter", "lora", "x:Y", "acme-lora", "2.1", "editable"))


def test_the_rows_say_who_what_and_how_much():
    plan = Plan(
        config={"base_model": "m"},
        choices=(CHOICE,),
        device="cpu",
        dtype="float32",
        settings={"gradient clipping": "1.0"},
        steps=120,
        memory={"weights": 100 * MiB, "adapter": 3 * MiB},
        trainable=1_234_567,
    )
    assert plan.rows() == [
        ("adapter", "lora  (acme-lora 2.1, editable)"),
        ("device", "cpu"),
        ("dtype", "float32"),
        ("gradient clipping", "1.0"),
        ("steps", "120"),
        ("trainable", "1,234,567 parameters"),
        ("memory", "about 103 MiB (weights 100, adapter 3)"),
    ]


def test_what_is_unknown_is_said_with_its_reason():
    plan = Plan({}, (), "cpu", "float32", why_no_steps="the data is not local", why_no_memory="the model is not local")
    assert dict(plan.rows()) == {
        "device": "cpu",
        "dtype": "float32",
        "steps": "unknown: the data is not local",
        "memory": "unknown: the model is not local",
    }


def test_a_plan_is_frozen_plain_data():
    plan = Plan({"lora": {"r": 8}}, (CHOICE,), "cpu", "float32", checks=(Check("lora on bnb", "untested"),), steps=3)
    content = plan.to_dict()
    assert json.loads(json.dumps(content)) == content == dataclasses.replace(plan).to_dict()
    assert content["choices"] == [
        {"kind": "adapter", "name": "lora", "distribution": "acme-lora", "version": "2.1", "origin": "editable"}
    ]
    assert content["checks"] == [{"what": "lora on bnb", "state": "untested", "detail": ""}]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps = 4


def test_a_context_is_silent_unless_told_otherwise(tmp_path):
    ctx = RunContext(Plan({}, (), "cpu", "float32"), 1, "cpu", tmp_path, tmp_path)
    assert isinstance(ctx.progress, NoProgress) and ctx.log.name == "hyperion"
    with ctx.progress.task("tokenizing", total=3) as advance:
        assert advance(3) is None


class Reading(Adapter):
    capabilities = Capabilities(needs=frozenset({"forward", "dequantize", "telepathy"}))


class Calling(Adapter):
    pass


class Closed(Quantizer):
    pass


class Open(Quantizer):
    provides = Provides(dequantize=True)


def test_a_pair_fits_by_what_it_declares():
    assert check_pair(Calling, Closed) is check_pair(Calling, Open) is check_pair(Reading, None) is None
    problem = check_pair(Reading, Closed)
    assert "Reading cannot work on a base quantized by Closed" in problem.what
    assert '"dequantize" (its weights in full precision)' in problem.why
    assert '"telepathy" (unknown to this contract)' in problem.why and "forward" not in problem.why
    assert "dequantize" not in check_pair(Reading, Open).why
