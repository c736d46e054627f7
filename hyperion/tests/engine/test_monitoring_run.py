"""What a person sees of a run, and the samples it leaves."""

from __future__ import annotations

import dataclasses
import io
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset
from rich.console import Console

from hyperion.engine import figures
from hyperion.engine.batches import Batching
from hyperion.monitoring.metrics import MetricsFile
from hyperion.monitoring.progress import RichProgress
from hyperion.monitoring.samples import prompts_of


def watched_run(tiny, folder, terminal):
    run = tiny.Run(folder, max_steps=4, evaluation=tiny.rows(4), eval_strategy="steps", eval_steps=4)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    run.ctx = dataclasses.replace(run.ctx, progress=RichProgress(console))
    return run, console.file


def test_off_terminal_each_logged_step_is_one_line(tiny, tmp_path):
    run, text = watched_run(tiny, tmp_path, terminal=False)
    run.fit(samples=1)
    lines = text.getvalue().splitlines()
    pattern = r"step {}/4  loss \d+\.\d{{4}}  lr \d\.\d\de-03  [\d,]+ tokens/s  [\d,]+ MiB  \d+:\d\d left"
    assert [line for line in lines if line.startswith("step 2/")] == [lines[0]]
    assert re.fullmatch(pattern.format(2), lines[0])
    assert re.fullmatch(pattern.format(4), lines[1])
    assert re.fullmatch(r"step 4/4  eval_loss \d\.\d{4}", lines[2])
    assert [line.split()[0] for line in lines[3:]] == ["prompt:", "expected:", "generated:"]


def test_on_a_terminal_one_line_lives_and_is_gone_after_a_crash(tiny, tmp_path):
    run, text = watched_run(tiny, tmp_path, terminal=True)
    run.hooks.adapter("lowrank")
    run.evaluation = run.evaluation.add_column("extra", [1] * 4).remove_columns("labels")  # evaluation will fail
    with pytest.raises(KeyError, match="labels"):
        run.fit()
    assert "training" in text.getvalue()
    assert "tokens/s" in text.getvalue()
    assert not run.ctx.progress._bars.live.is_started


def test_prompts_end_where_the_first_answer_begins():
    rows = Dataset.from_dict(
        {
            "input_ids": [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10], [5, 6], [5, 6, 7]],
            "labels": [[5, 6, 7, 8], [-100, -100, 7, 8, -100, 10], [-100, -100], [-100, 6, 7]],
        }
    )
    found = prompts_of(rows, 5)  # the first row has nothing to answer to, the third nothing to learn
    assert [(prompt.ids, prompt.expected) for prompt in found] == [([5, 6], [7, 8]), ([5], [6, 7])]
    assert len(prompts_of(rows, 1)) == 1


def test_samples_are_the_models_greedy_answers(tiny, tmp_path):
    run = tiny.Run(tmp_path, max_steps=2, evaluation=tiny.rows(4), eval_strategy="steps", eval_steps=2)
    model = run.fit(samples=2).model
    lines = MetricsFile(tmp_path / "samples.jsonl").read()
    assert [line["step"] for line in lines] == [2, 2]
    import torch

    for line in lines:
        ids = [int(word[1:]) for word in line["prompt"].split()]
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        answer = " ".join(f"t{i}" for i in ids[len(line["prompt"].split()) :])
        assert line["generated"] == answer


def test_data_seconds_are_those_in_which_steps_wait_for_their_rows(tiny, tmp_path, monkeypatch):
    """By a clock that only batching moves: 5 s for each of four steps, and for each of an evaluation's two batches."""
    clock, batched = [0.0], Batching.__call__

    def slowly(self, batches):
        clock[0] += 5
        return batched(self, batches)

    monkeypatch.setattr(figures, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Batching, "__call__", slowly)
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    tiny.Run(tmp_path, max_steps=4, evaluation=tiny.rows(4), **evaluating).fit()
    lines = [line for line in MetricsFile(tmp_path / "timing.jsonl").read() if "data_seconds" in line]
    assert [(line["step"], line["data_seconds"], line["seconds"]) for line in lines] == [(2, 10, 10), (4, 20, 20)]
    assert clock[0] == 40
