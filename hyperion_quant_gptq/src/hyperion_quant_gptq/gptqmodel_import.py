"""gptqmodel, kept from changing the process that imports it. Loaded only with torch.

On import it prints a banner, sets environment variables (HF_HOME among them), gives the root logger a level and a
handler, adds warning filters, and puts a function of its own in safetensors' place; these are put back. What stays, for
nothing else could be loaded beside it then: entries in transformers' tables of quantizers, a wrapper around the loader
of GPTQ checkpoints and one around its kernels, and a module `causal_conv1d`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from hyperion_core.errors import PluginRequirementError
from hyperion_core.quiet import ON_IMPORT, errors_only


def gptq_classes(log: logging.Logger) -> tuple[Any, Any]:
    """`GPTQ` and `GPTQConfig` of gptqmodel. What it says on import goes to `log`, at debug level.

    Raises:
        PluginRequirementError: it cannot be imported.
    """
    if "gptqmodel" not in sys.modules:
        with _contained(log):
            _import()
    gptq = importlib.import_module("gptqmodel.quantization.gptq")
    config = importlib.import_module("gptqmodel.quantization.config")
    return gptq.GPTQ, config.GPTQConfig


def _import() -> None:
    try:
        importlib.import_module("gptqmodel")
        importlib.import_module("logbar").LogBar.shared().setLevel(logging.ERROR)
    except Exception as error:  # whatever an extension built for another torch runs into
        raise PluginRequirementError(
            "gptqmodel, which the quantizer gptq is made of, cannot be imported",
            why=f"{type(error).__name__}: {error}",
            fix="build it beside the torch that is here: pip install --no-build-isolation 'gptqmodel>=7.6,<7.7'",
        ) from error


@contextlib.contextmanager
def _contained(log: logging.Logger) -> Iterator[None]:
    import safetensors.torch
    import torch

    environment, filters = dict(os.environ), list(warnings.filters)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    save_file, threads = safetensors.torch.save_file, torch.get_num_threads()
    rng, python_rng = torch.get_rng_state(), random.getstate()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), errors_only(*ON_IMPORT):
            yield
    finally:
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
        warnings.filters[:] = filters  # type: ignore[index]
        root.setLevel(level)
        root.handlers[:] = handlers
        safetensors.torch.save_file = save_file
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
        random.setstate(python_rng)
        if said.getvalue().strip():
            log.debug("gptqmodel says on import: %s", said.getvalue().strip())
