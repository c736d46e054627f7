"""The forecast of memory, against what the libraries really hold."""

from __future__ import annotations

import pytest

from hyperion.optimization.memory_model import optimizer_bytes


@pytest.mark.parametrize(
    "name",
    [
        "adamw_torch",
        "sgd",
        "adafactor",
        "adagrad",
        "rmsprop",
        "adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "ademamix",
    ],
)
def test_the_optimizer_keeps_what_is_forecast(name: str) -> None:
    torch = pytest.importorskip("torch")
    if "8bit" in name or name.startswith(("paged", "lion", "ademamix")):
        pytest.importorskip("bitsandbytes")
    from transformers import Trainer, TrainingArguments

    weight = torch.nn.Parameter(torch.randn(256, 512))
    arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([weight], **options)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    held = {
        id(x): x.nbytes for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor) and x.numel() > 256
    }
    said = optimizer_bytes(weight.nbytes, name)
    assert said == pytest.approx(sum(held.values()), rel=0.1, abs=weight.nbytes / 50)
