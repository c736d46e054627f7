"""Checkpoints of GPTQ: what their config.json says, and how transformers makes room for them.

transformers is imported inside functions.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import ModelError
from hyperion_core.facts import ModelFacts

from .config import GptqConfig
from .grouping import AS_IT_IS, BITS, GROUP_SIZES

if TYPE_CHECKING:
    from .packed_linear import PackedLinear

QUANT_METHOD = "gptq"
#: What transformers' own loader of "gptq" does not know. Written into checkpoints whose embeddings are packed; those
#: without are loaded by it too, for bits by module, and say "gptq".
OURS = "hyperion_gptq"
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class Saved:
    """`modules` gives (bits, group size) by name of what is quantized, `default` those of modules that the checkpoint
    does not name, -1 for a whole row; `version` is the format's."""

    options: dict[str, Any]
    default: tuple[int, int]
    modules: dict[str, tuple[int, int]]
    version: int


def read(saved: Mapping[str, Any], model: ModelFacts) -> Saved:
    """What `quantization_config` of a checkpoint says of a model's modules.

    Raises:
        ModelError: it is incomplete, or of a kind that is not read.
    """
    try:
        default = _pair(saved["bits"], saved.get("group_size", -1))
        options = {"sym": saved.get("sym", True), "desc_act": saved.get("desc_act", False)}
        if isinstance(saved.get("damp_percent"), float) and 0 < saved["damp_percent"] < 1:
            options["damp_percent"] = saved["damp_percent"]
        mse = (saved.get("meta") or {}).get("mse")  # gptqmodel writes none where it searched no scale
        options["mse"] = float(mse) if isinstance(mse, (int, float)) and mse >= 0 else 0.0
        steps = (saved.get("meta") or {}).get("distill_steps")
        options["distill_steps"] = steps if isinstance(steps, int) and steps >= 0 else 0
        if saved.get("embedding_bits") is not None:
            options["embedding_bits"] = saved["embedding_bits"]
        GptqConfig.model_validate(options)
        named = str(saved.get("checkpoint_format") or saved.get("format") or "gptq")
        inside = [str(name) for names in saved.get("modules_in_block_to_quantize") or [] for name in names]
        modules = {}
        for fact in model.linear():
            bits, group_size = _overridden(saved.get("dynamic") or {}, fact.name, default)
            if bits != AS_IT_IS and (not inside or fact.name.endswith(tuple(inside))):
                modules[fact.name] = (bits, group_size if group_size > 0 else fact.shape[1])
    except (KeyError, ValueError, TypeError, AttributeError, re.error) as error:
        raise ModelError(
            "the model is quantized by GPTQ, and its config.json does not say how",
            why=f'"quantization_config" is incomplete or damaged ({type(error).__name__}: {error})',
            fix="copy the model again, or quantize it again",
        ) from error
    unread = {
        f'the format "{named}"': named not in _VERSIONS,
        "a quantized output head": bool(saved.get("lm_head")),
        f"words of {saved.get('pack_dtype')}": saved.get("pack_dtype", "int32") != "int32",
        f"{default[0]} bits": default[0] not in BITS,
    }
    for what, is_so in unread.items():
        if is_so:
            raise ModelError(
                f"this checkpoint of GPTQ has {what}, which is not read",
                why=f"read are the formats {' and '.join(_VERSIONS)}, 2, 3, 4 and 8 bits in words of int32",
                fix="start from the unquantized model, or convert the checkpoint with gptqmodel",
            )
    return Saved(options, default, modules, _VERSIONS[named])


def written(
    config: GptqConfig,
    packed: Mapping[str, PackedLinear],
    left: list[str],
    version: int,
    embedding_bits: int | None = None,
) -> dict[str, Any]:
    """The inverse: `quantization_config` as gptqmodel, transformers and others read it.

    Args:
        packed: the quantized modules by name.
        left: linear modules of the layers that are not quantized.
        embedding_bits: of embedding and output head; None where they are not packed.
    """
    modules = {name: (packed[name].bits, size) for name, size in _written_group_sizes(packed).items()}
    (bits, group_size), _ = Counter(modules.values()).most_common(1)[0]
    named = next(name for name, number in _VERSIONS.items() if number == version)
    saved: dict[str, Any] = {
        "quant_method": OURS if embedding_bits else QUANT_METHOD,
        "bits": bits,
        "group_size": group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "damp_percent": config.damp_percent,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "format": named,
        "checkpoint_format": named,
        # Readers take zero points of sym: false in version 1 from those alone whose arithmetic they know.
        "meta": {
            "quantizer": [f"gptqmodel:{_version()}"],
            "mse": config.mse,
            "distill_steps": config.distill_steps,
        },
    }
    dynamic: dict[str, dict[str, int]] = {
        f"+:^{re.escape(name)}$": {"bits": pair[0], "group_size": pair[1]}
        for name, pair in modules.items()
        if pair != (bits, group_size)
    }
    if left and not dynamic:  # transformers' own loader knows this list, and not the patterns
        saved["modules_in_block_to_quantize"] = [list(modules)]
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in left}
    if embedding_bits:
        saved["embedding_bits"] = embedding_bits
    return {**saved, "dynamic": dynamic} if dynamic else saved


def _written_group_sizes(packed: Mapping[str, PackedLinear]) -> dict[str, int]:
    """A group that is a whole row is -1 where no reader knows its number, or where -1 alone says the same of all."""
    rows = {name for name, module in packed.items() if module.group_size == module.in_features}
    alike = rows == packed.keys() and len({module.group_size for module in packed.values()}) > 1
    return {
        name: -1 if name in rows and (alike or module.group_size not in GROUP_SIZES) else module.group_size
        for name, module in packed.items()
    }


def loading_config(saved: Mapping[str, Any]) -> Any:
    """A `quantization_config` for `from_pretrained` that has the checkpoint loaded into our modules.

    transformers takes "loading attributes" over into what it reads from config.json; `quant_method` is one here.
    """
    from transformers import GPTQConfig

    _register_with_transformers()

    class Loading(GPTQConfig):
        def get_loading_attributes(self) -> dict[str, Any]:
            return {"quant_method": OURS, "hyperion_saved": dict(saved)}

    Loading.__name__ = "GPTQConfig"  # transformers compares the names
    warnings.filterwarnings("ignore", message=r"You passed `quantization_config`[\s\S]*hyperion_saved")
    return Loading(bits=4)


@functools.cache
def _register_with_transformers() -> None:
    """Teach `from_pretrained` to make room for the packed weights of a checkpoint."""
    from hyperion_core.live_facts import live_model_facts
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import GPTQConfig

    class Loader(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            from .packed_embedding import pack_embeddings
            from .packed_linear import PackedLinear

            found = read(self.quantization_config.hyperion_saved, live_model_facts(model))
            for name, (bits, group_size) in found.modules.items():
                linear: Any = model.get_submodule(name)
                shape = (linear.nf, linear.nx) if hasattr(linear, "nf") else (linear.out_features, linear.in_features)
                with linear.weight.device:
                    packed = PackedLinear(
                        shape, linear.bias, bits, group_size, sym=found.options["sym"], version=found.version
                    )
                model.set_submodule(name, packed)
            if bits := found.options.get("embedding_bits"):
                pack_embeddings(model, bits)

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    AUTO_QUANTIZER_MAPPING[OURS] = Loader
    AUTO_QUANTIZATION_CONFIG_MAPPING[OURS] = GPTQConfig


def _overridden(dynamic: Mapping[str, Mapping[str, Any]], name: str, default: tuple[int, int]) -> tuple[int, int]:
    """(bits, group size) of a module by gptqmodel's rule: the first pattern that its name begins with."""
    for pattern, changes in dynamic.items():
        if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, name):
            if pattern.startswith("-:"):
                return AS_IT_IS, 0
            return _pair(changes.get("bits", default[0]), changes.get("group_size", default[1]))
    return default


def _pair(bits: Any, group_size: Any) -> tuple[int, int]:
    return int(bits), int(group_size)


def _version() -> str:
    return metadata.version("gptqmodel")
