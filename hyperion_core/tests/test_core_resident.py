"""The conformance kit's scales: what a model holds is found wherever a library keeps it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hyperion_core.testing.resident import resident_bytes, resident_tensors

torch = pytest.importorskip("torch")


class Packed(torch.Tensor):
    """A weight that is made of two tensors, as torchao's are: 100 bytes where its shape says 256."""

    @staticmethod
    def __new__(cls: type, data: Any, scale: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (8, 8), dtype=torch.float32)

    def __init__(self, data: Any, scale: Any) -> None:
        self.data_part, self.scale_part = data, scale

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *arguments: Any) -> Any:
        raise AssertionError(f"{operation}: to be weighed it need not be calculated with")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_part", "scale_part"], None


def module(**attributes: Any) -> Any:
    made = torch.nn.Module()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_a_tensor_that_is_made_of_others_weighs_what_they_weigh() -> None:
    packed = Packed(torch.zeros(64, dtype=torch.uint8), torch.zeros(9))
    assert resident_bytes(module(weight=packed)) == 64 + 36


def test_what_hangs_on_a_parameter_counts() -> None:
    """As the scales of a bitsandbytes weight do."""
    weight = torch.nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = SimpleNamespace(absmax=torch.zeros(2), nested=SimpleNamespace(absmax=torch.zeros(1)))
    assert resident_bytes(module(weight=weight)) == 32 + 8 + 4


def test_a_copy_that_is_kept_beside_counts_and_shared_memory_counts_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    held = module(weight=weight, originals={"before": [torch.zeros(4)]}, config=SimpleNamespace(size=3))
    whole = module(inner=held, tied=module(weight=weight))
    assert resident_bytes(whole) == 32 + 16
    assert set(resident_tensors(whole)) == {"inner.weight", "inner.originals.before.0"}
