"""A disk that fills up, or a folder that vanishes: a clear error, and the last checkpoint is whole and goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal

import pytest
import torch
from hyperion_core.errors import TrainingError

from hyperion.acceleration import offloading
from hyperion.engine.checkpointing import CheckpointedTrainer
from hyperion.engine.checkpoints import latest_checkpoint


@pytest.fixture
def full_disk():
    """Inside `full_disk(bytes)`, no file of this process may grow beyond that: what a quota does, from the kernel."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)

    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [16, 400, 6000], ids=["the log", "the adapter", "the optimizer"])
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_goes_on(size, tiny, tmp_path, full_disk, monkeypatch):
    settings = {"save_steps": 4, "logging_steps": 4, "eval_strategy": "no"}
    whole = tiny.Run(tmp_path / "whole", **settings)
    whole.folder.mkdir()
    expected = whole.fit()

    run = tiny.Run(tmp_path / "run", **settings)
    run.folder.mkdir()
    save, calls = CheckpointedTrainer._maybe_log_save_evaluate, []

    def fill(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 8:
            full_disk(size)
        save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointedTrainer, "_maybe_log_save_evaluate", fill)
        with pytest.raises(TrainingError, match="cannot be written") as caught:
            run.fit()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert "--resume: checkpoint-4 is complete" in caught.value.fix, caught.value
    assert caught.value.why
    assert not list(run.folder.glob(".checkpoint-*")), "what was half-written still fills the disk"

    checkpoint = latest_checkpoint(run.folder)
    assert checkpoint.name == "checkpoint-4"
    again = tiny.Run(run.folder, **settings)
    result = again.fit(resume=checkpoint)
    before, after = whole.trained(expected.model), again.trained(result.model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_a_folder_that_vanishes_ends_the_run(tiny, tmp_path, monkeypatch):
    run = tiny.Run(tmp_path / "run", save_steps=4, logging_steps=4, eval_strategy="no")
    run.folder.mkdir()
    save = CheckpointedTrainer._maybe_log_save_evaluate

    def vanish(self, *args, **kwargs):
        if self.state.global_step == 5:
            shutil.rmtree(run.folder)
        save(self, *args, **kwargs)

    monkeypatch.setattr(CheckpointedTrainer, "_maybe_log_save_evaluate", vanish)
    with pytest.raises(TrainingError, match="cannot be written") as caught:
        run.fit()
    assert "is gone" in caught.value.why
    assert not run.folder.exists(), "the run went on as if nothing had happened"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing reserves room on a disk here")
def test_a_disk_without_room_for_activations_ends_the_run(tiny, tmp_path, monkeypatch):
    """Their files are mapped: bytes that are not reserved beforehand are missed with a signal that kills."""
    monkeypatch.setattr(offloading, "_LEAST", 256)
    run = tiny.Run(tmp_path / "run", save_steps=4, eval_strategy="no")
    run.folder.mkdir()
    reserve, save = os.posix_fallocate, CheckpointedTrainer._maybe_log_save_evaluate
    sizes, full = [], []

    def fill(self, *args, **kwargs):
        save(self, *args, **kwargs)
        full.extend([True] * (self.state.global_step == 5))

    def reserved(file, start, size):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, start, size)
        sizes.append((os.fstat(file).st_blocks * 512, size))

    monkeypatch.setattr(CheckpointedTrainer, "_maybe_log_save_evaluate", fill)
    monkeypatch.setattr(os, "posix_fallocate", reserved)
    with pytest.raises(TrainingError, match="activations cannot be written") as caught:
        run.fit(offload_activations="disk")
    assert caught.value.why == os.strerror(errno.ENOSPC)
    assert "--resume: checkpoint-4 is complete" in caught.value.fix
    assert sizes and all(held >= size >= 256 for held, size in sizes)
    assert not list(run.folder.glob(".activations*"))
