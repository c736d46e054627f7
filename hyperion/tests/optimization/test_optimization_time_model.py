"""Operations of a step, against a count by hand, and seconds from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hyperion_core.facts import ModelFacts, ModuleFact

from hyperion.memory import planned_step
from hyperion.optimization import time_model
from hyperion.optimization.memory_model import Held, Step
from hyperion.optimization.time_model import measured_rate, step_operations, step_seconds
from hyperion.training_config import TrainingConfig

# Three layers of 4 * 4 + 8 * 4 = 48 weights, and a vocabulary of 10.
MODULES = [
    ModuleFact(f"model.layers.{number}.{name}", "linear", shape)
    for number in range(3)
    for name, shape in (("q_proj", (4, 4)), ("up_proj", (8, 4)))
]
FACTS = ModelFacts("tiny", modules=tuple(MODULES), hidden_size=4, layers=3, vocab_size=10)
EVERY = tuple(module.name for module in MODULES)
# Rows of 6 tokens in packs of 12, of which 10 are learnt: a token and each of the 10 words, 2 * 4 forward and as many
# for the gradient of the state.
HEAD = 10 / 12 * 10 * 2 * (2 * 4)


def test_operations_are_those_counted_by_hand() -> None:
    # Forward, a layer and token: 2 a weight, and 2 * 4 each for the score and the value of the 3 tokens before it, half
    # a row. Backward: 2 a weight for the gradient of what came in, and twice the attention.
    weights, attention = 2 * 48, 2 * (2 * 4) * 3
    forward, backward = weights + attention, weights + 2 * attention
    step, held = Step(12, 6), Held(0, 5, EVERY)
    whole = 24 * (3 * (forward + backward) + HEAD + 5 * 6)
    assert step_operations(FACTS, held, step, 24) == pytest.approx(whole)
    again = Step(12, 6, checkpointed=2)
    assert step_operations(FACTS, held, again, 24) == pytest.approx(whole + 24 * 2 * forward)
    top = Held(0, 5, EVERY[-2:])
    # no gradient flows below the last layer, so that nothing is computed again there
    assert step_operations(FACTS, top, again, 24) == pytest.approx(whole - 24 * 2 * backward)
    quantized = Held(0, 5, EVERY, quantized=True)
    more = step_operations(FACTS, quantized, step, 24) - whole
    assert more == pytest.approx(2 * time_model._UNPACKING * 2 * 3 * 48)  # twice in each of two passes


@pytest.mark.parametrize("length", [1024, 4096])
def test_attention_is_over_the_whole_row(length: int) -> None:
    def operations(tokens: int) -> float:
        step = planned_step(TrainingConfig(pack_length=4096), FACTS, tokens, "float32", "cpu")
        return step_operations(FACTS, Held(0, 0, EVERY), step, 4096) / 4096

    # of the head, a token more of each row is learnt; beside that a longer row is attention alone
    assert operations(length) - operations(512) == pytest.approx(3 * 6 * 4 * (length - 512), rel=1e-3)


def test_a_rate_gives_seconds_and_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    assert step_seconds(3e12, 1e12) == pytest.approx(3 / time_model.EFFICIENCY)
    probed: list[int] = []
    monkeypatch.setattr(time_model, "_probe", lambda width, dtype, device: probed.append(width) or 7e9)
    (tmp_path / "matrix-product-rates.json").write_text("{cut off", encoding="utf-8")
    assert [measured_rate(512, "float32", "cpu", tmp_path) for _ in range(2)] == [7e9, 7e9]
    assert probed == [512]
    measured_rate(512, "bfloat16", "cpu", tmp_path)
    assert probed == [512, 512]
