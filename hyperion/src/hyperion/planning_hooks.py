"""Hook calls while planning: what a plugin raises, or gives that is none of the contract's, is told as its fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from hyperion_core import specs
from hyperion_core.errors import HyperionError, PluginHookError
from hyperion_core.facts import Cost, Recommendation
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import Plugin
from hyperion_core.registry import registry

# By the verb of a hook: what it must give.
_GIVES: dict[str, tuple[type, ...]] = {
    "check": (list, type(None)),
    "targets": (list,),
    "estimate": (Cost,),
    "recognize": (tuple,),
    "recommend": (Recommendation, type(None)),
    "dtype": (str, type(None)),
}


class PlanningHooks:
    """The drivers of one run, as `RunHooks` has them. In training they are called directly: there the exception's
    own type is needed, to tell a full memory for one."""

    def __init__(self, hooks: RunHooks) -> None:
        self._hooks = hooks

    def adapter(self, name: str) -> specs.AdapterSpecs:
        return cast(specs.AdapterSpecs, _Guarded(self._hooks.adapter(name), "adapter", name))

    def quantizer(self, name: str) -> specs.QuantizerSpecs:
        return cast(specs.QuantizerSpecs, _Guarded(self._hooks.quantizer(name), "quantizer", name))

    def scheduler(self, name: str) -> specs.SchedulerSpecs:
        return cast(specs.SchedulerSpecs, _Guarded(self._hooks.scheduler(name), "scheduler", name))

    def objective(self, name: str) -> specs.ObjectiveSpecs:
        return cast(specs.ObjectiveSpecs, _Guarded(self._hooks.objective(name), "objective", name))

    def plugin(self, kind: str, name: str) -> Plugin:
        """The registered instance."""
        return self._hooks.plugin(kind, name)


class _Guarded:
    def __init__(self, driver: Any, kind: str, name: str) -> None:
        self._driver = driver
        self._kind = kind
        self._name = name

    def __getattr__(self, hook: str) -> Callable[..., Any]:
        gives = _GIVES[hook.rpartition("_")[2]]

        def call(**arguments: Any) -> Any:
            try:
                result = getattr(self._driver, hook)(**arguments)
            except HyperionError:
                raise
            except Exception as error:
                raise self._failed(hook, f"it raised {type(error).__name__}: {error}") from error
            if not isinstance(result, gives):
                wanted = " or ".join("None" if each is type(None) else each.__name__ for each in gives)
                raise self._failed(hook, f"it gave a {type(result).__name__}, and the contract asks for {wanted}")
            return result

        return call

    def _failed(self, hook: str, why: str) -> PluginHookError:
        whose = registry().find(self._kind, self._name).whose
        return PluginHookError(
            f'the {self._kind} "{self._name}" of {whose} failed in {hook}',
            why=why,
            fix=f"it is the plugin's fault: tell its authors, or choose another {self._kind}",
        )
