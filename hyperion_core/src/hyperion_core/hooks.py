"""One run's hook calls, over pluggy: typed for drivers, and harmless from observers.

hooks = RunHooks()
hooks.add(LoraAdapter(), "lora")
model = hooks.adapter("lora").adapter_apply(model=model, name="default", config=config, ctx=ctx)
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, cast

import pluggy

from . import specs
from .errors import PluginHookError
from .kinds import ListedPlugin, Observer, Plugin
from .suggest import closest

if TYPE_CHECKING:
    from .config import StrictModel
    from .distributions import PluginEntry

log = logging.getLogger("hyperion")
ALL_HOOKS = {name: page for page in specs.ALL_SPECS for name in specs.hook_names(page)}
_MARK = f"{specs.PROJECT}_impl"


class HookManager(pluggy.PluginManager):
    """Takes every method that bears the prefix of the plugin's kind, decorated or not, as pytest does.

    pluggy alone ignores an undecorated hook in silence.
    """

    def __init__(self) -> None:
        super().__init__(specs.PROJECT)
        for page in specs.ALL_SPECS:
            self.add_hookspecs(page)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        opts = super().parse_hookimpl_opts(plugin, name)
        if opts is None and isinstance(plugin, Plugin) and name.startswith(plugin.prefix):
            return {} if inspect.isroutine(inspect.getattr_static(plugin, name)) else None
        return opts


def check_hooks(plugin: type[Plugin], entry: PluginEntry) -> None:
    """Refuse a plugin whose hooks do not fit the contract, and say which.

    Raises:
        PluginHookError: a required hook is missing, a name is misspelt, an argument is unknown or has a default, or
            a hook of another kind is implemented.
    """
    for error in hook_errors(plugin, entry):
        raise error


def hook_errors(plugin: type[Plugin], entry: PluginEntry) -> Iterator[PluginHookError]:
    """Everything in which a plugin's hooks do not fit the contract; `check_hooks` raises the first of it."""
    whose = f'the {entry.kind} "{entry.name}" of {entry.whose}'
    hooks = specs.hook_names(plugin.hooks)
    methods = [name for name in dir(plugin) if not name.startswith("_") and callable(getattr(plugin, name))]
    for name in methods:
        own = name.startswith(plugin.prefix)
        if own and name not in hooks:
            yield PluginHookError(
                f"{whose} has a hook that the contract does not know: {name}", why="its name is misspelt, or too new",
                fix=_meant(name, hooks),
            )  # fmt: skip
        if name in ALL_HOOKS and not own and not (issubclass(plugin, Observer) and _is_wrapper(plugin, name)):
            yield PluginHookError(
                f"{whose} implements {name}, a hook of another kind",
                why="only an observer may touch another kind's hook, and only to wrap it",
                fix="decorate it with @hookimpl(wrapper=True)"
                if issubclass(plugin, Observer)
                else f"take it out, or rename it if it is no hook; an observer can wrap {name}",
            )
        if name in ALL_HOOKS:
            yield from _argument_errors(plugin, name, whose)
    strangers = [name for name in methods if name not in ALL_HOOKS and not hasattr(plugin.__mro__[-2], name)]
    explained: set[str | None] = set()
    for name in plugin.required():
        if name not in methods:
            near = closest(name, strangers)
            explained.add(near)
            yield PluginHookError(
                f"{whose} lacks the hook {name}",
                why=f"every {plugin.kind} that declares what it declares must have it",
                fix=f"rename {near} to {name}" if near else f"add a method {name}{_signature(name)}",
            )
    for name in strangers:
        near = closest(name, hooks)
        own = name.startswith(plugin.prefix)  # named above
        if near and not own and name not in explained and near not in methods and _alike(name, near):
            yield PluginHookError(
                f"{whose} has a method {name} that looks like the misspelt hook {near}",
                why="it would never be called",
                fix=f"rename it to {near}, or to something less alike",
            )


class RunHooks:
    """The plugins of one run, and the calls to them."""

    def __init__(self) -> None:
        self.manager = HookManager()
        self._muted: set[str] = set()

    def add(self, plugin: Plugin, name: str, config: StrictModel | None = None) -> None:
        """Register one plugin's instance under the name that it was chosen by.

        Args:
            config: becomes `plugin.config`, None its config class's defaults; for the kinds of which a list acts
                alone: a driver gets its config with each call.

        Raises:
            ConfigError: there is no config, and its config class has no default for every option.
            PluginHookError: pluggy refuses one of its hooks.
        """
        key = f"{plugin.kind}:{name}"
        if isinstance(plugin, ListedPlugin):
            plugin.config = plugin.config_class() if config is None else config
        elif config is not None:
            raise TypeError(f"{key} is a driver: give its config to its hooks")
        try:
            self.manager.register(plugin, key)
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginHookError(
                f'the {plugin.kind} "{name}" does not fit the contract',
                why=str(error),
                fix="see hyperion_core/specs.py",
            ) from error
        if isinstance(plugin, Observer):
            self._make_harmless(plugin, key)

    def adapter(self, name: str) -> specs.AdapterSpecs:
        return cast(specs.AdapterSpecs, self._driver("adapter", name))

    def quantizer(self, name: str) -> specs.QuantizerSpecs:
        return cast(specs.QuantizerSpecs, self._driver("quantizer", name))

    def scheduler(self, name: str) -> specs.SchedulerSpecs:
        return cast(specs.SchedulerSpecs, self._driver("scheduler", name))

    def curriculum(self, name: str) -> specs.CurriculumSpecs:
        return cast(specs.CurriculumSpecs, self._driver("curriculum", name))

    def objective(self, name: str) -> specs.ObjectiveSpecs:
        return cast(specs.ObjectiveSpecs, self._driver("objective", name))

    def strategy(self, name: str) -> specs.StrategySpecs:
        return cast(specs.StrategySpecs, self._driver("strategy", name))

    def deploy_target(self, name: str) -> specs.DeploySpecs:
        return cast(specs.DeploySpecs, self._driver("deploy-target", name))

    def plugin(self, kind: str, name: str) -> Plugin:
        """The registered instance."""
        plugin = self.manager.get_plugin(f"{kind}:{name}")
        if plugin is None:
            raise KeyError(f'no {kind} called "{name}" takes part in this run')
        return cast(Plugin, plugin)

    def observe(self, hook: str, **arguments: Any) -> None:
        """Tell every observer. One that raises is warned about once, and hears no more."""
        getattr(self.manager.hook, hook)(**arguments)

    def _driver(self, kind: str, name: str) -> _Driver:
        return _Driver(self.manager, self.plugin(kind, name))

    def _mute(self, key: str, hook: str, error: Exception) -> None:
        if key not in self._muted:
            self._muted.add(key)
            log.warning("%s raised in %s and is muted for this run: %r", key.replace(":", " ", 1), hook, error)

    def _make_harmless(self, plugin: Observer, key: str) -> None:
        for caller in self.manager.get_hookcallers(plugin) or []:
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin:
                    wraps = implementation.wrapper or implementation.hookwrapper
                    harmless = self._harmless_wrapper if wraps else self._harmless_listener
                    guarded = harmless(implementation.function, key, caller.name)
                    implementation.function = guarded  # type: ignore[misc]  # pluggy's stub says final; it is not

    def _harmless_listener(self, listener: Callable[..., Any], key: str, hook: str) -> Callable[..., None]:
        """The hook, run so that its exception mutes it and goes no further."""

        def guarded(*arguments: Any, **named: Any) -> None:
            if key not in self._muted:
                try:
                    listener(*arguments, **named)
                except Exception as error:
                    self._mute(key, hook, error)

        return guarded

    def _harmless_wrapper(
        self, wrapper: Callable[..., Any], key: str, hook: str
    ) -> Callable[..., Generator[None, Any, Any]]:
        """The wrapper, run so that its own exceptions mute it and the wrapped hook's result passes unchanged."""

        def guarded(*arguments: Any, **named: Any) -> Generator[None, Any, Any]:
            inner = None
            if key not in self._muted:
                try:
                    inner = wrapper(*arguments, **named)
                    next(inner)
                except Exception as error:
                    self._mute(key, hook, error)
                    inner = None
            try:
                result = yield
            except BaseException as failure:
                if inner is not None:
                    try:
                        inner.throw(failure)
                    except BaseException as error:
                        if error is not failure and not isinstance(error, StopIteration):
                            self._mute(key, hook, RuntimeError(f"raised {error!r} while {failure!r} was passing"))
                raise
            if inner is not None:
                try:
                    inner.send(result)
                except StopIteration:
                    pass
                except Exception as error:
                    self._mute(key, hook, error)
            return result

        return guarded


class _Driver:
    """Calls one plugin's hooks: the others of its kind are left out, observers' wrappers stay."""

    def __init__(self, manager: HookManager, plugin: Plugin) -> None:
        self._manager = manager
        self._plugin = plugin
        self._others = [
            other
            for other in manager.get_plugins()
            if other is not plugin and getattr(other, "kind", "") == plugin.kind
        ]

    def __getattr__(self, hook: str) -> Callable[..., Any]:
        caller = self._manager.subset_hook_caller(hook, self._others)

        def call(*positional: Any, **named: Any) -> Any:
            named.update(zip(_parameters(hook), positional, strict=False))
            return caller(**named)

        return call


def _parameters(hook: str) -> list[str]:
    return list(inspect.signature(getattr(ALL_HOOKS[hook], hook)).parameters)[1:]


def _signature(hook: str) -> str:
    return f"(self, {', '.join(_parameters(hook))})"


def _is_wrapper(plugin: type[Plugin], name: str) -> bool:
    mark = getattr(getattr(plugin, name), _MARK, None)
    return isinstance(mark, dict) and bool(mark.get("wrapper"))


def _argument_errors(plugin: type[Plugin], name: str, whose: str) -> Iterator[PluginHookError]:
    known = _parameters(name)
    for argument in list(inspect.signature(getattr(plugin, name)).parameters.values())[1:]:
        if argument.name not in known:
            yield PluginHookError(
                f"{whose} takes an argument that {name} does not have: {argument.name}",
                why=f"the contract gives {', '.join(known)}",
                fix=_meant(argument.name, known),
            )
        elif argument.default is not argument.empty or argument.kind is not argument.POSITIONAL_OR_KEYWORD:
            yield PluginHookError(
                f"{whose} takes the argument {argument.name} of {name} with a default, or by keyword alone",
                why="not every version of pluggy gives such an argument its value",
                fix=f"give it no default, and no * before it: {argument.name}",
            )


def _meant(name: str, allowed: Any) -> str:
    near = closest(name, allowed)
    return f'did you mean "{near}"?' if near else "see hyperion_core/specs.py"


def _alike(name: str, hook: str) -> bool:
    """Whether two names differ by a slip of the keyboard, not by meaning: same length but for one, few changes."""
    return difflib.SequenceMatcher(None, name, hook).ratio() > 0.9
