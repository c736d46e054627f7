"""A run shows its own lines, not those of the libraries that peft looks for; their errors stay errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hyperion_peft.beside_gptqmodel import without_gptqmodel


def test_an_adapter_is_attached_without_a_word() -> None:
    """In a process of its own, whatever of torchao, bitsandbytes and gptqmodel is installed; the last stays out."""
    code = (
        "import sys; from hyperion_core.quiet import ON_IMPORT, errors_only\n"
        "with errors_only(*ON_IMPORT): from hyperion_peft import attach\n"
        "import peft; from hyperion_core.testing.tiny import tiny_llama\n"
        "attach.attach(tiny_llama(), 'default', peft.LoraConfig(target_modules='all-linear'), 0)\n"
        "assert 'gptqmodel' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_gptqmodel_is_asked_for_again_afterwards_and_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import gptq

    answer = gptq.is_gptqmodel_available
    monkeypatch.delitem(sys.modules, "gptqmodel", raising=False)
    with without_gptqmodel():
        assert gptq.is_gptqmodel_available() is False
    assert gptq.is_gptqmodel_available is answer
    monkeypatch.setitem(sys.modules, "gptqmodel", sys)
    with without_gptqmodel():
        assert gptq.is_gptqmodel_available is answer
