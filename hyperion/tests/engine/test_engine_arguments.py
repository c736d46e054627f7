"""Arguments that a library refuses are explained before a run begins."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hyperion_core.errors import TrainingError

from hyperion.engine.fit import check_arguments

CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "lomo"}, r'"lomo" cannot train an adapter'),
        ({"optim": "galore_adamw"}, r'"galore_adamw" cannot train an adapter'),
        ({"optim": "adamw_torch_xla"}, r"training\.optim \('adamw_torch_xla'\): refused\n.*torch_xla"),
        ({"optim_args": "foo"}, r"training\.optim_args \('foo'\): refused"),
        ({"adam_beta1": 5.0}, r"training\.adam_beta1 \(5\.0\): refused\n.*beta parameter"),
        ({**CHECKPOINTING, "gradient_checkpointing_kwargs": {"foo": 1}}, r"_kwargs \(\{'foo': 1\}\): refused\n.*foo"),
        ({"dataloader_persistent_workers": True}, r"training\.dataloader_persistent_workers \(True\).*\n.*num_workers"),
        ({"log_level": "spam"}, r"training\.log_level \('spam'\): refused"),
        ({"data_seed": -3}, r"training\.data_seed \(-3\): refused"),
        ({"logging_steps": 2.5, "log_level": "spam"}, r"training\.logging_steps \(2\.5\): refused\n.*an integer"),
        ({"fp16": True}, r"training\.fp16 does not work on cpu(?s:.*)bf16"),
    ],
)
def test_a_refused_option_is_named_with_the_librarys_reason(arguments, message):
    with pytest.raises(TrainingError, match=message):
        check_arguments({"use_cpu": True, "learning_rate": 1e-3, "weight_decay": 0.1, **arguments})


def test_a_library_that_is_not_installed_is_to_be_installed(monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(TrainingError, match=r"(?s)training\.optim \('adamw_bnb_8bit'\).*fix: install what it lacks"):
        check_arguments({"use_cpu": True, "optim": "adamw_bnb_8bit"})


def test_a_check_leaves_no_folder_and_no_trace_in_the_random_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = torch.get_rng_state()
    check_arguments(
        {
            "use_cpu": True, "bf16": True, "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2,
            "gradient_checkpointing_kwargs": {"use_reentrant": True}, "load_best_model_at_end": True, "save_steps": 3,
            "dataloader_num_workers": 1, "dataloader_persistent_workers": True, "optim": "adafactor", "seed": 7,
        }
    )  # fmt: skip
    check_arguments({"use_cpu": True, "output_dir": "out", "neftune_noise_alpha": 5.0})
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
