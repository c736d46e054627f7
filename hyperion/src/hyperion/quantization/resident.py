"""What a model's base really takes in memory, its quantized modules by what their quantizer says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperion_core.specs import QuantizerSpecs
    from torch.nn import Module


def base_bytes(model: Module, quantizer: QuantizerSpecs | None) -> int:
    """Bytes of everything that is not trained, each tensor once: packed weights with their scales, and the rest.

    Args:
        model: a base, with or without an adapter on it; nothing but the adapter may be trainable.
        quantizer: the driver of the method that the base is quantized by.
    """
    packed = dict(quantizer.quantizer_modules(model=model)) if quantizer is not None else {}
    inside = tuple(f"{name}." for name in packed)
    rest: dict[tuple[Any, ...], int] = {}
    for name, module in model.named_modules():
        if name in packed or (inside and name.startswith(inside)):
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not tensor.requires_grad:
                rest[tensor.device, tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(info.nbytes for info in packed.values()) + sum(rest.values())
