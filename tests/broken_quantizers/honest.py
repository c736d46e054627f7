"""What the broken ones start from."""

from __future__ import annotations

from typing import Any

from hyperion_core.facts import BitPlan

from hyperion.plugin_templates.quantizer.plugin import ChangemeQuantizer as Honest


def packed(model: Any) -> dict[str, Any]:
    """The quantized modules, by name."""
    return {name: model.get_submodule(name) for name in Honest().quantizer_modules(model)}


def live(model: Any) -> Any:
    from hyperion_core.live_facts import live_model_facts

    return live_model_facts(model)


class Afterwards(Honest):
    """Loads honestly, and then does something more to the model."""

    def quantizer_after_load(self, model: Any, config: Any, bits: BitPlan, training: bool) -> Any:
        self.more(super().quantizer_after_load(model, config, bits, training), bits)
        return model

    def more(self, model: Any, bits: BitPlan) -> None: ...
