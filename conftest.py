"""For every test of every distribution here. It stands at the root, the only place where `pytest_plugins` may."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import tempfile
from pathlib import Path

import pytest

# Both are read when torch and huggingface_hub are first imported, so they are set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order: the same bits on every machine size
os.environ["HF_HUB_OFFLINE"] = "1"
# Nothing of a user's own cache is read or written; it goes when the tests end.
_cache = tempfile.TemporaryDirectory(prefix="hyperion-tests-")
os.environ["HYPERION_CACHE"] = _cache.name

# Folders at the root that bear their package's name: pytest's importlib mode would make empty namespace packages of
# them, and hide the real ones. The core's own tests run without any of these installed.
for name in (
    "hyperion",
    "hyperion_adapters_ia3",
    "hyperion_adapters_lora",
    "hyperion_quant_bnb",
    "hyperion_quant_gptq",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

# The same examples in every run: a test must not pass by luck. `pytest --hypothesis-profile=default` draws new ones.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

pytest_plugins = ["hyperion_core.testing.fixtures"]


def pytest_collection_finish() -> None:
    # What was imported stays: the collector, which libraries and runs call, need not look through torch each time.
    gc.collect()
    gc.freeze()


# Core and framework are measured, by their own tests and those of the whole, but for slow ones: measuring takes half as
# long again, and what these go through, others do too.
_MEASURED = tuple(Path(__file__).parent / folder for folder in ("tests", "hyperion", "hyperion_core"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") or not any(item.path.is_relative_to(folder) for folder in _MEASURED):
            item.add_marker("no_cover")
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
