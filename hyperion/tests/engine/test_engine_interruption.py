"""A signal ends a run behind a checkpoint, and the run that goes on from there is the one that was never stopped."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from hyperion.engine.checkpoints import latest_checkpoint
from hyperion.engine.engine import Engine
from hyperion.engine.interruption import Interrupted, Interruption
from hyperion.monitoring.samples import SampleWriter

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")

SETTINGS = {
    "steps": {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 4, "logging_steps": 2, "eval_on_start": True},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    "mixed": {"eval_strategy": "epoch", "save_steps": 6, "logging_strategy": "epoch"},  # saved before its evaluation
    "best": {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "load_best_model_at_end": True,
        "save_total_limit": 1, "learning_rate": 0.5,
    },
    "patience": {
        "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "num_train_epochs": 4,
        "load_best_model_at_end": True, "learning_rate": 0.5,
    },
    "never": {"save_strategy": "no", "max_steps": 7, "train_sampling_strategy": "group_by_length"},
}  # fmt: skip


def run_in(tiny, folder, name):
    # 22 rows, batch 2, accumulation 2: 6 steps an epoch, the last of 1 micro-batch
    folder.mkdir(exist_ok=True)
    return tiny.Run(
        folder, config=tiny.LowRankConfig(dropout=0.1, lr_ratio=2.0), evaluation=tiny.rows(6, seed=9),
        weight_decay=0.05, neftune_noise_alpha=3.0, **SETTINGS[name],
    )  # fmt: skip


def fit(run, name, resume=None):
    torch.manual_seed(0 if resume is None else 777)  # a new process has other random numbers
    return run.fit(resume=resume, samples=1, patience={"best": 3, "patience": 1}.get(name))


@pytest.fixture
def signal_at(monkeypatch):
    """Sends a signal to this process at the n-th call of a method."""

    def send(owner, method, call, signum=signal.SIGTERM):
        whole, calls = getattr(owner, method), []

        def counted(self, *args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), signum)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counted)
        return lambda: monkeypatch.setattr(owner, method, whole)

    return send


MOMENTS = [
    *[("steps", Engine, "training_step", call) for call in (1, 2, 7, 11, 12, 13, 22)],
    *[("steps", Engine, "_objective_loss", call) for call in (1, 2, 8, 9)],  # the first two evaluate
    ("steps", SampleWriter, "_answer", 2),
    ("steps", Engine, "_save_checkpoint", 2),
    *[("epochs", Engine, "training_step", call) for call in (3, 11, 22)],
    ("epochs", Engine, "evaluation_loop", 1),
    ("epochs", Engine, "_save_checkpoint", 2),
    *[("mixed", Engine, "training_step", call) for call in (10, 11, 22)],
    ("mixed", Engine, "evaluation_loop", 2),
    ("mixed", Engine, "_save_checkpoint", 1),
    *[("best", Engine, "training_step", call) for call in (4, 7, 8)],
    *[("best", Engine, "evaluation_loop", call) for call in (1, 2, 4)],
    ("best", SampleWriter, "_answer", 3),
    *[("patience", Engine, "evaluation_loop", call) for call in (1, 2)],
    ("never", Engine, "training_step", 5),
    ("never", Engine, "training_step", 13),
]


@pytest.fixture(scope="module")
def whole_runs(tiny, tmp_path_factory):
    """Each setting, never interrupted: (folder, its run, its result)."""
    runs = {}
    for name in SETTINGS:
        run = run_in(tiny, tmp_path_factory.mktemp("whole") / "run", name)
        runs[name] = run.folder, run, fit(run, name)
    return runs


@pytest.mark.no_cover
@pytest.mark.parametrize("name, owner, method, call", MOMENTS)
def test_a_run_that_a_signal_ended_goes_on_exactly(
    name, owner, method, call, tiny, whole_runs, tmp_path, signal_at
):  # fmt: skip
    folder, whole, expected = whole_runs[name]
    restore = signal_at(owner, method, call)
    with pytest.raises(Interrupted) as caught:
        fit(run_in(tiny, tmp_path / "run", name), name)
    restore()
    assert caught.value.signum == signal.SIGTERM
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert caught.value.checkpoint == checkpoint, "the error names another checkpoint than the newest"

    resumed = run_in(tiny, tmp_path / "run", name)
    result = fit(resumed, name, resume=checkpoint)
    before, after = whole.trained(expected.model), resumed.trained(result.model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    for file in folder.glob("[ms]*s.jsonl"):
        assert (tmp_path / "run" / file.name).read_bytes() == file.read_bytes(), file.name
    assert result.steps == expected.steps
    assert result.metrics["train_loss"] == expected.metrics["train_loss"]
    assert result.metrics.get("eval_loss") == expected.metrics.get("eval_loss")
    last = latest_checkpoint(folder)
    if (
        last is not None and "load_best_model_at_end" not in SETTINGS[name]
    ):  # there, which one is kept depends on when the run was stopped
        assert latest_checkpoint(tmp_path / "run").name == last.name
        for file in STATE:
            assert equal(load(tmp_path / "run" / last.name / file), load(last / file)), file


def load(path):
    return torch.load(path, weights_only=False)


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return (one == other) if not hasattr(one, "shape") else bool((one == other).all())


@pytest.mark.parametrize(
    "name, moments",
    [
        ("steps", [("training_step", 3), ("training_step", 4), ("training_step", 4), ("training_step", 5)]),
        ("epochs", [("evaluation_loop", 1), ("training_step", 3)]),  # the end of an epoch is not made up for twice
    ],
)
def test_signals_one_after_the_other_still_end_where_no_signal_does(
    name, moments, tiny, whole_runs, tmp_path, signal_at, monkeypatch
):  # fmt: skip
    folder, whole, expected = whole_runs[name]
    checkpoint = None
    for method, call in moments:
        restore = signal_at(Engine, method, call)
        with pytest.raises(Interrupted) as caught:
            fit(run_in(tiny, tmp_path / "run", name), name, resume=checkpoint)
        restore()
        checkpoint = caught.value.checkpoint
        if name == "epochs" and method == "evaluation_loop":  # made up for, and then killed

            def die(self, *args, **kwargs):
                raise ZeroDivisionError

            with monkeypatch.context() as patch:
                patch.setattr(Engine, "training_step", die)
                with pytest.raises(ZeroDivisionError):
                    fit(run_in(tiny, tmp_path / "run", name), name, resume=checkpoint)
            checkpoint = latest_checkpoint(tmp_path / "run")
    resumed = run_in(tiny, tmp_path / "run", name)
    result = fit(resumed, name, resume=checkpoint)
    before, after = whole.trained(expected.model), resumed.trained(result.model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["steps", "best", "never", "mixed"])
def test_a_run_that_was_killed_behind_its_last_checkpoint_trains_no_further(name, tiny, whole_runs, tmp_path):
    folder, whole, expected = whole_runs[name]
    again = run_in(tiny, folder, name)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return
    metrics = (folder / "metrics.jsonl").read_bytes()
    result = fit(again, name, resume=checkpoint)
    assert result.steps == expected.steps
    before, after = whole.trained(expected.model), again.trained(result.model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (folder / "metrics.jsonl").read_bytes() == metrics


@pytest.fixture
def ctrl_c():
    """As in the foreground: what a shell starts in the background, tests too, ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_signal_ends_at_once():
    def twice():
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.requested
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        twice()
    assert not isinstance(caught.value, Interrupted)


@pytest.mark.usefixtures("ctrl_c")
def test_handlers_are_given_back_and_foreign_ones_are_left_alone(monkeypatch):
    own = []
    before = signal.signal(signal.SIGTERM, lambda *_: own.append(1))
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert own == [1] and not interruption.requested
            assert signal.getsignal(signal.SIGINT) == interruption._remember
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("ctrl_c")
def test_outside_the_main_thread_nothing_is_touched():
    seen = []

    def enter():
        with Interruption() as interruption:
            seen.append((interruption.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]


def test_no_clock_is_believed(tiny, whole_runs, tmp_path, monkeypatch):
    import time

    folder, whole, expected = whole_runs["steps"]
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 + (-1) ** next(jumps) * 1e8)  # three years forth and back
    run = run_in(tiny, tmp_path / "run", "steps")
    result = fit(run, "steps")
    before, after = whole.trained(expected.model), run.trained(result.model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert latest_checkpoint(tmp_path / "run").name == latest_checkpoint(folder).name
