"""The fast product on a CPU is the product, is taken where it may be, and never where gradients are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hyperion_core.facts import BitPlan
from torch import Tensor

from hyperion_quant_gptq import cpu_kernel
from hyperion_quant_gptq.config import GptqConfig
from hyperion_quant_gptq.packed_embedding import PackedTable
from hyperion_quant_gptq.packed_linear import PackedLinear
from hyperion_quant_gptq.plugin import GptqQuantizer
from hyperion_quant_gptq.rounding import rounded

SHAPE = (64, 128)  # (out, in)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inputs of each call of the kernel."""
    seen: list[int] = []
    true = cpu_kernel.KernelWeight.product

    def product(self: Any, x: Tensor) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return true(self, x)

    monkeypatch.setattr(cpu_kernel.KernelWeight, "product", product)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # elsewhere it is right too, but slow
    return seen


def linear(bits: int, group_size: int = 32, *, sym: bool = True) -> PackedLinear:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + (0 if sym else 1)
    module = PackedLinear(SHAPE, torch.nn.Parameter(torch.ones(SHAPE[0])), bits, group_size, sym=sym, version=1)
    module.hold(rounded(weight, bits, group_size, sym))
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, SHAPE[1], generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_the_product_with_the_unpacked_weight(bits: int, group_size: int, products: list[int]) -> None:
    """As nearly as bfloat16 computes it; for one token and several."""
    module = linear(bits, group_size)
    for shape in ((1, 1), (2, 3), (256,)):
        x = inputs(*shape)
        with torch.no_grad():
            found = module(x)
        expected = x.double() @ module.unpacked().double().T + 1
        assert found.dtype == torch.bfloat16 and found.shape == (*shape, SHAPE[0])
        assert ((found - expected).norm() / expected.norm()) < 2**-7
    assert products == [1, 6, 256]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_takes_it_too(bits: int, products: list[int]) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    table = PackedTable(SHAPE, bits)
    table.hold(rounded(weight, bits, table.group_size, sym=True))
    with torch.no_grad():
        found = table.product(inputs(5))
    expected = inputs(5).double() @ table.rows().double().T
    assert ((found - expected).norm() / expected.norm()) < 2**-7 and products == [5]


def test_it_is_not_taken_where_it_may_not_be(products: list[int]) -> None:
    """With gradients, in float32, for many inputs, with zero points: then the weight is unpacked."""
    module, x = linear(4), inputs(4)
    module(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        module(x.float())
        module(inputs(257))
        linear(4, sym=False)(x)
        linear(4, group_size=16)(x)
    assert not products


@pytest.mark.parametrize("native", [True, False])
def test_for_many_inputs_it_is_the_product_with_the_unpacked_weight(
    native: bool, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor that multiplies bfloat16, and on one that does not."""
    monkeypatch.setattr(cpu_kernel, "_MULTIPLIES_BFLOAT16", native)
    module, x = linear(4), inputs(300).requires_grad_()
    found = module(x)
    expected = x.double() @ module.unpacked().double().T + 1
    assert found.dtype == torch.bfloat16 and ((found - expected).norm() / expected.norm()) < 2**-7
    (gradient,) = torch.autograd.grad(found.float().sum(), x)
    assert gradient.dtype == torch.bfloat16 and not products


@pytest.mark.parametrize(
    "bits, options, where, expected",
    [
        (BitPlan(4, 64), {}, "cpu x86_64", "bfloat16"),
        (BitPlan(16, 0, {"*": (3, 128)}), {}, "cpu AMD64", "bfloat16"),
        (BitPlan(4, 64), {}, "cuda x86_64", None),
        (BitPlan(4, 64), {}, "cpu arm64", None),
        (BitPlan(4, 64), {"sym": False}, "cpu x86_64", None),
        (BitPlan(4, 64), {"desc_act": True}, "cpu x86_64", None),
        (BitPlan(4, 64, {"a": (8, 512)}), {}, "cpu x86_64", None),
        (BitPlan(16, 0), {}, "cpu x86_64", None),
    ],
)
def test_left_to_itself_it_answers_in_what_the_kernel_takes(
    bits: BitPlan, options: dict[str, bool], where: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, machine = where.split()
    monkeypatch.setattr("platform.machine", lambda: machine)
    config = GptqConfig.parse({"method": "gptq", **options})
    assert GptqQuantizer().quantizer_inference_dtype(config, bits, device) == expected


def test_what_it_keeps_is_made_anew_when_the_weight_changes(products: list[int]) -> None:
    module, x = linear(4), inputs(4)
    with torch.no_grad():
        before = module(x)
        module.hold(rounded(-module.unpacked(), 4, 32, True))
        after = module(x)
    assert len(products) == 2
    torch.testing.assert_close(after - 1, 1 - before, rtol=0.2, atol=2.0)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (8, 32), (4, 16)], ids=str)
def test_it_is_part_of_one_graph_when_a_model_is_compiled(
    bits: int, group_size: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel does not take it, and the weight is unpacked."""
    monkeypatch.setattr(cpu_kernel, "_MULTIPLIES_BFLOAT16", native)
    module, x = linear(bits, group_size), inputs(1, 1)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
