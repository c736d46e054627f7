from __future__ import annotations

import subprocess
import sys

import pytest
from hyperion_core.errors import DataError
from hyperion_core.facts import Segment, Sequence, TokenScores
from hyperion_core.registry import Registry

from hyperion_objective_sft import SftConfig, SftObjective


def sequences(row):
    return SftObjective().objective_sequences(SftConfig(), row)


def test_the_entry_point_gives_the_class_and_its_hooks_fit():
    assert Registry.discover().load("objective", "sft") is SftObjective


def test_importing_it_is_light():
    code = "import sys, hyperion_objective_sft; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_segments_keep_their_order_and_supervision():
    row = {
        "segments": [{"text": "Q: 1+1\nA:", "supervised": False}, {"text": " 2", "supervised": True}],
        "messages": None,
    }
    assert sequences(row) == [Sequence(segments=(Segment("Q: 1+1\nA:", False), Segment(" 2", True)))]


def test_messages_lose_the_keys_that_arrow_filled_with_none():
    row = {"messages": [{"role": "user", "content": "hi", "tool_calls": None}], "segments": []}
    assert sequences(row) == [Sequence(messages=({"role": "user", "content": "hi"},))]


def test_a_row_with_nothing_to_learn_is_refused_and_says_what_it_has():
    with pytest.raises(DataError) as caught:
        sequences({"txt": "hello", "segments": []})
    assert "segments, txt" in caught.value.why and "DatasetProcessor" in caught.value.fix


@pytest.mark.parametrize("row", [{"segments": ["plain"]}, {"segments": [{"text": "a"}]}, {"messages": ["hi"]}])
def test_a_malformed_row_is_a_data_error_with_its_cause(row):
    with pytest.raises(DataError) as caught:
        sequences(row)
    assert caught.value.__cause__ is not None


def test_micro_batches_add_up_to_the_mean_over_the_step():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    logits = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    token = torch.randint(0, 7, (10,))
    logps = logits.log_softmax(-1)[torch.arange(10), token]

    whole = torch.nn.functional.cross_entropy(logits, token)
    total = torch.tensor(10)
    parts = []
    for part in (slice(0, 3), slice(3, 10)):
        loss, metrics = SftObjective().objective_loss(SftConfig(), logps[part], scores_of(torch, logits[part]), total)
        assert loss.shape == () and metrics == {}
        parts.append(loss)

    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(whole, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "config", [{"label_smoothing": 0.2}, {"z_loss": 0.1}, {"label_smoothing": 0.1, "z_loss": 0.01}]
)
def test_what_is_added_is_what_torch_and_the_paper_say(config):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    logits, token = torch.randn(10, 7, dtype=torch.float64, requires_grad=True), torch.randint(0, 7, (10,))
    logps = logits.log_softmax(-1)[torch.arange(10), token]
    loss, metrics = SftObjective().objective_loss(
        SftConfig(**config), logps, scores_of(torch, logits), torch.tensor(10)
    )
    smoothed = torch.nn.functional.cross_entropy(logits, token, label_smoothing=config.get("label_smoothing", 0.0))
    expected = smoothed + config.get("z_loss", 0.0) * logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["nll"], -logps.mean())


def scores_of(torch, logits):
    return TokenScores(torch.logsumexp(logits, -1), lambda: logits.mean(-1))


def test_no_supervised_token_gives_a_loss_of_zero_that_can_be_differentiated():
    torch = pytest.importorskip("torch")
    logps = torch.zeros(0, requires_grad=True)
    loss, _ = SftObjective().objective_loss(SftConfig(), logps, TokenScores(logps, lambda: logps), torch.tensor(5))
    loss.backward()
    assert loss.item() == 0.0
