"""Plugins that are not there, not whole, or not what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .case import Case, Place

Arrange = Callable[[Place], list[str]]

WHOLE = """
from hyperion_core.config import AdapterConfig
from hyperion_core.kinds import Adapter

class Mine(Adapter):
    config_class = AdapterConfig
    def adapter_targets(self, config, model): return []
    def adapter_estimate(self, config, model, work): return None
    def adapter_apply(self, model, name, config, ctx): return model
    def adapter_param_groups(self, model, name, config): return []
    def adapter_activate(self, model, weights): pass
    def adapter_save(self, model, name, config, folder, for_resume): return []
    def adapter_load(self, model, name, folder, trainable, ctx): return model
    def adapter_unload(self, model, name): return model
"""


def changed(**changes: Any) -> Arrange:
    return lambda place: ["validate", place.config(**changes)]


def adapter(source: str, **options: Any) -> Arrange:
    """Validate a config whose adapter is "mine" of the distribution acme-mine, whose module has this source."""

    def arrange(place: Place) -> list[str]:
        place.fake_dist(
            "acme-mine", {"hyperion.adapters": {"mine": "acme_mine:Mine"}}, {"acme_mine": source}, **options
        )
        return ["validate", place.config(adapter={"type": "mine", "r": ..., "target_modules": ...})]

    return arrange


def observer(source: str, **options: Any) -> Arrange:
    """Validate a config with the observer "watch" of the distribution acme-watch."""

    def arrange(place: Place) -> list[str]:
        place.fake_dist(
            "acme-watch", {"hyperion.observers": {"watch": "acme_watch:Watch"}}, {"acme_watch": source}, **options
        )
        return ["validate", place.config(plugins=["watch"])]

    return arrange


def _two_of_one_name(place: Place) -> list[str]:
    for owner in ("acme", "zeta"):
        place.fake_dist(f"{owner}-lora", {"hyperion.adapters": {"fine": f"{owner}_lora:X"}}, {f"{owner}_lora": ""})
    return ["validate", place.config(adapter={"type": "fine"})]


def case(what: str, arrange: Arrange, *says: str) -> Case:
    return Case("plugins", what, arrange, says)


WATCH = "from hyperion_core.kinds import Observer\nclass Watch(Observer):\n"
CASES: tuple[Case, ...] = (
    case("an adapter's name is misspelt", changed(adapter={"type": "lroa"}),
         'no installed distribution has an adapter called "lroa"', "installed:", 'did you mean "lora"?'),
    case("an adapter that is not installed", changed(adapter={"type": "vera"}), 'an adapter called "vera"',
         "hyperion plugins list"),
    case("an adapter of a distribution that is not installed", changed(adapter={"type": "acme-lora:lora"}),
         'an adapter called "acme-lora:lora"', "fix:"),
    case("an unknown scheduler", changed(training={"lr_scheduler": "cosin"}), 'a scheduler called "cosin"',
         'did you mean "cosine"?'),
    case("an unknown objective", changed(objective="dpo"), 'an objective called "dpo"', "installed:"),
    case("an unknown quantizer", changed(quantization={"method": "awq"}), 'a quantizer called "awq"'),
    case("an unknown observer", changed(plugins=["watch"]), 'an observer called "watch"', "no observer is installed"),
    case("a tracker among the observers", changed(plugins=["wandb"]), 'an observer called "wandb"',
         "training: {report_to: wandb}"),
    case("plugins: wandb, a word and no list", changed(plugins="wandb"), "plugins: 'wandb' is no list",
         "training: {report_to: wandb}"),
    case("plugins: watch, a word and no list", changed(plugins="watch"), "plugins: 'watch' is no list",
         "plugins: [watch]"),
    case("an observer twice", lambda place: [*observer(WATCH + "    pass")(place)[:1],
         place.config(plugins=["watch", "acme-watch:watch"])], "stands twice", "leave it out"),
    case("an unknown tracker", changed(training={"report_to": "wandbb"}), 'no tracker is called "wandbb"',
         'did you mean "wandb"?'),
    case("a tracker that is not installed", changed(training={"report_to": ["clearml"]}),
         'the tracker "clearml" is not installed', "python -m pip install clearml"),
    case("a name that two distributions offer", _two_of_one_name, "2 distributions offer the adapter \"fine\"",
         "acme-lora 1.0 and zeta-lora 1.0", '"acme-lora:fine" or "zeta-lora:fine"'),
    case("a plugin whose import fails", adapter("import nothing_of_the_kind"), 'the adapter "mine" of acme-mine 1.0',
         'needs the module "nothing_of_the_kind"', "python -m pip install nothing_of_the_kind"),
    case("a plugin with a syntax error", adapter("def broken(:\n"), 'the adapter "mine" of acme-mine 1.0 is broken',
         "SyntaxError", "--force-reinstall acme-mine"),
    case("a plugin that leaves Python as it is imported", adapter("raise SystemExit(0)"),
         'the adapter "mine" of acme-mine 1.0 is broken', "SystemExit"),
    case("a plugin without the class that it promises", adapter(""), 'the adapter "mine" of acme-mine 1.0 is broken',
         "Mine"),
    case("a plugin whose requirement is missing", adapter(WHOLE, requires=["hyperion-core>=1,<2", "unheard-of>=3"]),
         'the adapter "mine" of acme-mine 1.0 lacks a requirement', "unheard-of>=3", "python -m pip install"),
    case("a plugin for another contract", adapter(WHOLE, requires=["hyperion-core<1"]),
         "was built for another contract", "hyperion-core<1", "--upgrade acme-mine"),
    case("a plugin that does not say its contract", adapter(WHOLE, requires=[]), "was built for another contract",
         "its authors must add"),
    case("a plugin that is no adapter", adapter("class Mine: pass"), "is not an adapter", "hyperion_core.kinds.Adapter",
         "tell the authors of acme-mine"),
    case("a plugin that lacks a hook", adapter(WHOLE.replace("def adapter_save", "def save_it")), "adapter_save",
         "acme-mine 1.0"),
    case("a plugin with a misspelt hook", adapter(WHOLE.replace("def adapter_unload", "def adapter_unlaod")),
         "adapter_unl", "acme-mine 1.0"),
    case("a plugin whose hook asks for an unknown argument",
         adapter(WHOLE.replace("config, model):", "config, modul):")),
         "modul", "adapter_targets", "acme-mine 1.0"),
    case("a plugin that cannot be made", adapter(WHOLE + "    def __init__(self): raise RuntimeError('no licence')\n"),
         "cannot be made", "RuntimeError: no licence", "tell the authors of acme-mine"),
    case("a plugin whose config raises as it is read", adapter(WHOLE + """
class Weird(AdapterConfig):
    @classmethod
    def contradictions(cls, data): raise KeyError('surprise')
Mine.config_class = Weird
"""), "acme-mine 1.0", "KeyError", "surprise"),
    case("a plugin that gives no cost", adapter(WHOLE),
         'the adapter "mine" of acme-mine 1.0 failed in adapter_estimate',
         "it gave a NoneType, and the contract asks for Cost"),
    case("a plugin whose check raises", adapter(WHOLE + """
    def adapter_check(self, config, model, quantizer): return 1 / 0
"""), "acme-mine 1.0", "ZeroDivisionError", "adapter_check"),
)  # fmt: skip
