"""Each token that a model generates, by `torch.compile`. Functions import torch."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from hyperion_core.errors import CompatibilityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_generation(model: PreTrainedModel) -> None:
    """Let `model.generate` compute each token after the prompt's by compiled code, in a cache of fixed size.

    The first answer compiles, which takes a minute or more on a CPU; one that is longer than all before does so once
    again, for any length. torch keeps what it has compiled on disk.

    Raises:
        CompatibilityError: this model, the plugin that reads it, or this machine cannot.
    """
    name = type(model).__name__
    if not getattr(model, "_can_compile_fullgraph", False):
        raise _impossible(f"a {name} cannot be compiled", "transformers says so of the architecture")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        raise _impossible(f"a {name} that is quantized like this cannot be compiled", "its quantizer says so")
    if (device := model.device.type) not in ("cpu", "cuda"):
        raise _impossible(f'"{device}" does not run what is compiled', "torch.compile is for CPUs and CUDA here")
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if device == "cpu" and not shutil.which(compiler):
        why = "torch.compile writes C++ for a CPU"
        raise _impossible(f'there is no C++ compiler "{compiler}"', why, "install one, or ")
    model.generation_config.cache_implementation = "static"
    if device == "cpu":  # on CUDA, transformers compiles by itself where the cache is such a one
        from transformers import CompileConfig

        config = CompileConfig(mode="default")
        config._compile_all_devices = True
        model.generation_config.compile_config = config


def _impossible(what: str, why: str, other_fix: str = "") -> CompatibilityError:
    return CompatibilityError(what, why=why, fix=f"{other_fix}load it without compiled=True")
