"""Fixtures of the tests that put distributions together."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
from forking import cli as cli

# Quantizes offline, and counts how often.
OFFLINE = """
from pathlib import Path

from acme_rtn import RtnConfig, RtnQuantizer

class OfflineConfig(RtnConfig):
    method: str = "offline"

class Offline(RtnQuantizer):
    config_class = OfflineConfig

    def quantizer_prepare(self, source, config, bits, folder, ctx):
        from transformers import AutoModelForCausalLM

        assert not any(folder.iterdir())
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
        self.quantizer_save(self.quantizer_after_load(model, config, bits, False), config, folder)
        with Path(ctx.cache, "times").open("a") as file:
            file.write("once ")
        return folder
"""


@pytest.fixture
def rtn(fake_dist: Any) -> None:
    """The template's quantizer, installed as "rtn", and one made of it that quantizes offline."""
    source = files("hyperion") / "plugin_templates" / "quantizer" / "plugin.py"
    module = source.read_text(encoding="utf-8").replace("changeme", "rtn").replace("Changeme", "Rtn")
    fake_dist(
        "acme-rtn",
        {"hyperion.quantizers": {"rtn": "acme_rtn:RtnQuantizer", "offline": "acme_offline:Offline"}},
        {"acme_rtn": module, "acme_offline": OFFLINE},
    )
