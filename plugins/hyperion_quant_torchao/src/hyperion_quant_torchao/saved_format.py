"""Saved models: what their config.json says, and how transformers makes room for them.

transformers is imported inside functions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from hyperion_core.errors import ModelError

from .config import TorchaoConfig

QUANT_METHOD = "hyperion_torchao"  # "torchao" is transformers' own, which holds the unpacked tensors of torchao


def quantization_config(config: TorchaoConfig, modules: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """For config.json. modules: (bits, group size) by name."""
    return {
        "quant_method": QUANT_METHOD,
        "sym": config.sym,
        "intx_choose_qparams_algorithm": config.algorithm,
        "modules": {name: list(pair) for name, pair in modules.items()},
    }


def saved_options(saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The inverse: options of `TorchaoConfig`, and (bits, group size) by name.

    Raises:
        ModelError: something is missing, or is nothing that this plugin writes.
    """
    try:
        options = {key: saved[key] for key in ("sym", "intx_choose_qparams_algorithm")}
        TorchaoConfig.model_validate(options)
        modules = {str(name): (int(bits), int(group)) for name, (bits, group) in saved["modules"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f'the model is quantized by "{QUANT_METHOD}", and its config.json does not say how',
            why=f'"quantization_config" is incomplete or damaged ({type(error).__name__}: {error})',
            fix="copy the model again, or quantize it again",
        ) from error
    return options, modules


@functools.cache
def register_with_transformers() -> None:
    """Teach `from_pretrained` to make room for packed weights in a folder that says "quant_method": QUANT_METHOD."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class SavedConfig(QuantizationConfigMixin):
        def __init__(self, **saved: Any) -> None:
            saved_options(saved)
            self.__dict__.update(saved, quant_method=QUANT_METHOD)

    class Loader(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            from .packed_linear import packed_like

            options, modules = saved_options(self.quantization_config.to_dict())
            for name, (bits, group_size) in modules.items():
                model.set_submodule(name, packed_like(model.get_submodule(name), bits, group_size, options["sym"]))

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    # Transformers' own register_quantizer refuses a name that it has; a module that is imported anew comes here again.
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SavedConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = Loader
