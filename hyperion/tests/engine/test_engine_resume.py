"""A run that was interrupted and resumed is the run that was not, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from hyperion_core.errors import TrainingError

from hyperion.engine import checkpoints
from hyperion.engine.checkpoints import latest_checkpoint, remove_remains, rotate, writing_checkpoint
from hyperion.engine.engine import _LoopEvents
from hyperion.engine.fit import fit  # noqa: F401  imported here so that its cost is no test's


class Crash(Exception):
    pass


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def crash_at(monkeypatch, step):
    whole = _LoopEvents.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Crash
        whole(self, args, state, control, **kwargs)

    monkeypatch.setattr(_LoopEvents, "on_step_end", on_step_end)


def exact_run(tiny, folder):
    # 22 rows, batch 2, accumulation 2: 6 steps an epoch, the last of 1 micro-batch. Logs at 4, 8, 12 lie between
    # the checkpoints at 3, 6, 9, so that sums cross a checkpoint; the evaluations lie between both.
    return tiny.Run(
        folder, config=tiny.LowRankConfig(dropout=0.1, lr_ratio=2.0), evaluation=tiny.rows(6, seed=9),
        eval_strategy="steps", eval_steps=5, save_steps=3, logging_steps=4, weight_decay=0.05, save_total_limit=3,
        neftune_noise_alpha=3.0, eval_on_start=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("crash", "resumed_from"), [(4, 3), (5, 3), (7, 6), (11, 9)], ids=["first", "before-eval", "boundary", "second"]
)
def test_resuming_is_exact(tiny, tmp_path, monkeypatch, crash, resumed_from):
    whole = exact_run(tiny, tmp_path / "whole")
    expected = whole.fit(samples=1)

    broken = exact_run(tiny, tmp_path / "broken")
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        with pytest.raises(Crash):
            broken.fit(samples=1)
    (tmp_path / "broken" / "metrics.jsonl").open("a").write('{"step": 99, "loss": 1.0}\n{"step": 100, "lo')

    again = exact_run(tiny, tmp_path / "broken")
    checkpoint = latest_checkpoint(tmp_path / "broken")
    assert checkpoint.name == f"checkpoint-{resumed_from}"
    torch.manual_seed(777)  # a new process has other random numbers
    result = again.fit(resume=checkpoint, samples=1)

    before, after = whole.trained(expected.model), again.trained(result.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert lines_of(tmp_path / "broken") == lines_of(tmp_path / "whole")
    assert (tmp_path / "broken" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    assert result.metrics["train_loss"] == expected.metrics["train_loss"]
    assert result.steps == expected.steps == 12


def test_the_best_model_comes_back_and_its_checkpoint_stays(tiny, tmp_path):
    # the learning rate ruins the model, so that the first evaluation is the best; save_steps never meets it
    run = tiny.Run(
        tmp_path, evaluation=tiny.rows(6, seed=9), eval_strategy="steps", eval_steps=1, save_steps=2,
        learning_rate=3.0, load_best_model_at_end=True, save_total_limit=1, num_train_epochs=3,
    )  # fmt: skip
    result = run.fit(patience=4)
    evaluations = {line["step"]: line["eval_loss"] for line in lines_of(tmp_path) if "eval_loss" in line}
    best = min(evaluations, key=evaluations.get)
    assert result.stopped_early
    assert result.steps == best + 4 < 18
    assert result.best_checkpoint == tmp_path / f"checkpoint-{best}"
    assert result.metrics["eval_loss"] == evaluations[best]
    model = run.model(resume=result.best_checkpoint)
    assert all(torch.equal(run.trained(model)[name], t) for name, t in run.trained(result.model).items())
    assert sum(p.requires_grad for p in result.model.parameters()) == len(run.trained(result.model)) > 0
    last = max(step for kind, step in run.recorder.calls if kind == "checkpoint")
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{last}"}


def test_patience_respects_the_direction_of_the_metric():
    from hyperion.engine.early_stopping import evaluations_since_best

    history = [{"eval_x": 1.0}, {"loss": 0.1}, {"eval_x": 3.0}, {"eval_x": 3.0}, {"eval_x": 2.0}]
    assert evaluations_since_best(history, "x", greater_is_better=True) == 2
    assert evaluations_since_best(history, "eval_x", greater_is_better=False) == 3


def test_observers_hear_of_the_run_in_order(tiny, tmp_path):
    run = tiny.Run(tmp_path, evaluation=tiny.rows(4), eval_strategy="steps", eval_steps=4, max_steps=5)
    run.fit()
    kinds = [call if call[0] != "ready" else call[0] for call in run.recorder.calls]
    assert kinds == [
        "ready", ("step", 2), ("step", 4), ("evaluate", 4), ("checkpoint", 4), ("step", 5), ("evaluate", 5),
        ("checkpoint", 5),
    ]  # fmt: skip
    in_force = run.recorder.calls[0][1]
    assert in_force.world == 1
    assert in_force.dtypes == {"trainable": "float32", "base": "float32"}


def test_a_second_run_into_the_same_folder_is_refused_before_it_mixes_them(tiny, tmp_path):
    tiny.Run(tmp_path, max_steps=4).fit()
    with pytest.raises(TrainingError, match=r"(?s)checkpoint-4 is the last.*--resume"):
        tiny.Run(tmp_path, max_steps=4).fit()


def write(output, step, text="x", then=None):
    with writing_checkpoint(output, step) as folder:
        (folder / "optimizer.pt").write_text(text)
        if then is not None:
            raise then
    return output / f"checkpoint-{step}"


def test_a_write_that_is_cut_short_leaves_no_checkpoint(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(Crash):
        write(tmp_path, 4, "half", then=Crash())
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / ".checkpoint-4.partial").mkdir()  # what is left where no exception came, but a kill
    remove_remains(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_replacing_a_checkpoint_survives_a_crash_between_its_two_renames(tmp_path, monkeypatch):
    write(tmp_path, 2, "old")
    rename, calls = checkpoints.os.replace, []

    def dies_second(source, target):
        calls.append(target)
        if len(calls) == 3:  # complete.json, the old folder aside, then the new one
            raise Crash
        rename(source, target)

    monkeypatch.setattr("hyperion.engine.checkpoints.os.replace", dies_second)
    with pytest.raises(Crash):
        write(tmp_path, 2, "new")
    monkeypatch.undo()
    remove_remains(tmp_path)
    assert (latest_checkpoint(tmp_path) / "optimizer.pt").read_text() == "old"
    write(tmp_path, 2, "new")
    assert (latest_checkpoint(tmp_path) / "optimizer.pt").read_text() == "new"


def test_a_damaged_checkpoint_is_passed_over_and_cannot_be_resumed(tiny, tmp_path):
    tiny.Run(tmp_path, max_steps=8).fit()
    damaged = tmp_path / "checkpoint-8"
    (damaged / "optimizer.pt").write_bytes((damaged / "optimizer.pt").read_bytes()[:-1] + b"?")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    with pytest.raises(TrainingError, match=r"optimizer\.pt is not as it was written"):
        tiny.Run(tmp_path, max_steps=8).fit(resume=damaged)


def test_rotation_counts_steps_as_numbers_and_spares_what_it_must(tmp_path):
    paths = {step: write(tmp_path, step) for step in (2, 4, 9, 10)}
    rotate(tmp_path, 2, keep={paths[10], paths[2]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    rotate(tmp_path, None, keep=set())
    assert len(list(tmp_path.iterdir())) == 2
