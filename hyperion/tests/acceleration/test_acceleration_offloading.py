"""Activations that wait elsewhere give the same gradients to the bit, and do not wait in memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
import transformers

from hyperion.acceleration import offloading
from hyperion.acceleration.offloading import offloaded

WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
PLACES = ["ram", pytest.param("disk", marks=pytest.mark.skipif(sys.platform == "win32", reason="not on Windows"))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE)).train()


def gradients(model, seed=0, between=lambda: None):
    ids = torch.randint(0, 128, (1, 300), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    between()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_the_same_to_the_bit(model, tmp_path, place, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(2):
        expected = gradients(model, seed)
        with offloaded(model, place, tmp_path):
            found = gradients(model, seed)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_they_wait_on_disk_and_not_in_memory(model, tmp_path, monkeypatch):
    written, resident = [], []
    write = offloading._in_file
    monkeypatch.setattr(offloading, "_in_file", lambda *given: written.append(given[0].nbytes) or write(*given))

    def look():
        with open("/proc/self/smaps", encoding="utf-8") as lines:
            mapped = False
            for line in lines:
                if "-" in line.split()[0]:
                    mapped = str(tmp_path) in line
                elif mapped and line.startswith("Rss:"):
                    resident.append(1024 * int(line.split()[1]))

    with offloaded(model, "disk", tmp_path):
        gradients(model, between=look)
    assert sum(written) > 3 * 300 * 512 * 4 * 3  # gate, up and their product, of three layers
    assert sum(resident) < sum(written) / 20
    weights = {parameter.nbytes for parameter in model.parameters()}
    assert not weights & set(written)


def test_views_come_back_with_their_strides():
    whole = torch.arange(120.0).view(2, 3, 20)
    for view in (whole, whole.transpose(1, 2), whole[:, 1:], whole[:1].expand(4, 3, 20)):
        copy = offloading._empty(view, pin_memory=False).copy_(view)
        assert torch.equal(copy, view)
    assert offloading._empty(whole.transpose(1, 2), pin_memory=False).stride() == whole.transpose(1, 2).stride()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_what_is_freed_between_other_tensors_goes_back_to_the_system() -> None:
    """Blocks of 2 MiB that are freed while one behind each stays; by glibc's own bound they would be kept."""
    code = """
import sys, torch
from pathlib import Path
from hyperion.acceleration.allocator import give_back_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "given":
    give_back_large_blocks()
torch.empty(30 << 20, dtype=torch.uint8).fill_(1)  # freed at once: glibc's bound rises to its size
before = resident()
kept, freed = [], []
for _ in range(40):
    freed.append(torch.ones(2 << 20, dtype=torch.uint8))
    kept.append(torch.ones(1 << 16, dtype=torch.uint8))
freed.clear()
print((resident() - before) >> 20)
"""
    left = [
        int(subprocess.run([sys.executable, "-c", code, said], capture_output=True, text=True, check=True).stdout)
        for said in ("given", "left")
    ]
    assert left[0] < 10 < 40 < left[1], left
