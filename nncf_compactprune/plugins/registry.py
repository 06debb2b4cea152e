"""The registry of plugins: what is installed, merged, with every name owned by exactly one plugin."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from nncf_compactprune.errors import PluginError, nearest
from nncf_compactprune.plugins import hookspecs
from nncf_compactprune.plugins.hookspecs import PROJECT_NAME, Event

if TYPE_CHECKING:
    from torch import nn

    from nncf_compactprune.plugins.hookspecs import (
        Algorithm,
        Allocation,
        DatasetResolver,
        FactsFn,
        Importance,
        LatencyMeter,
        ModelResolver,
        OpRule,
        Schedule,
    )

_PREFIX = "compactprune_"
_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith(_PREFIX))
_EVENT_HOOK = "compactprune_event"
#: for messages: what one entry of a registry is called
_NOUNS = {
    "algorithms": "algorithm",
    "importance": "importance criterion",
    "allocations": "allocation",
    "schedules": "schedule",
    "op_rules": "rule for the operator",
    "module_facts": "facts function for the module class",
    "models": "model scheme",
    "datasets": "data set scheme",
    "export_formats": "export format",
    "latency_meters": "latency meter",
}


class Plugins:
    """Everything that the registered plugins offer.

    A new one is empty: it loads no entry points by itself. :func:`default_plugins` is the one that users get.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT_NAME)
        self._manager.add_hookspecs(hookspecs)
        self._owners: dict[tuple[str, Any], str] = {}
        self.algorithms: dict[str, type[Algorithm]] = {}
        self.importance: dict[str, Importance] = {}
        self.allocations: dict[str, Allocation] = {}
        self.schedules: dict[str, Schedule] = {}
        self.op_rules: dict[str, OpRule] = {}
        self.module_facts: dict[type[nn.Module], FactsFn] = {}
        self.models: dict[str, ModelResolver] = {}
        self.datasets: dict[str, DatasetResolver] = {}
        self.export_formats: dict[str, type[Any]] = {}
        self.latency_meters: dict[str, LatencyMeter] = {}

    def register(self, plugin: object, name: str | None = None) -> str:
        """Adds a plugin: whole, or not at all.

        :param plugin: a module or object with functions marked ``@hookimpl``.
        :param name: what to call it in messages; its ``__name__`` or class by default.
        :return: the plugin's name.
        :raises PluginError: on a misspelt or unmarked hook, a hook that fails or returns something else than specified,
            a name that another plugin owns, or a plugin that was registered before.
        """
        name = name or getattr(plugin, "__name__", None) or f"{type(plugin).__qualname__} at {id(plugin):#x}"
        self._check_hooks(plugin, name)
        earlier = self._manager.get_name(plugin)
        if earlier is not None or self._manager.has_plugin(name):
            raise _error(name, f"is registered already{f' as {earlier!r}' if earlier not in (None, name) else ''}")
        try:
            self._manager.register(plugin, name)
            offers = self._offers(plugin, name)
        except Exception as error:
            # pluggy before 1.7 stores a plugin before it verifies it, and our own checks come later still.
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            if isinstance(error, PluginError):
                raise
            raise _error(name, str(error)) from error
        for (registry, key), value in offers.items():
            getattr(self, registry)[key] = value
            self._owners[registry, key] = name
        return name

    def load_entry_points(self) -> None:
        """Registers every installed entry point of the group ``nncf_compactprune``.

        :raises PluginError: naming the distribution whose entry point does not load or is refused.
        """
        for entry in entry_points(group=PROJECT_NAME):
            distribution = entry.dist.name if entry.dist is not None else "unknown distribution"
            name = f"{distribution}:{entry.name}"
            try:
                plugin = entry.load()
            except Exception as error:
                remedy = f"Repair it or uninstall it (pip uninstall {distribution})"
                reason = f"entry point {entry.value!r} does not load: {type(error).__name__}: {error}. {remedy}"
                raise _error(name, reason) from error
            self.register(plugin, name)

    def get_algorithm(self, name: str) -> type[Algorithm]:
        """
        :param name: what a configuration's ``"algorithm"`` says.
        :raises PluginError: with the nearest known name, or all of them.
        """
        if name in self.algorithms:
            return self.algorithms[name]
        known = ", ".join(repr(key) for key in sorted(self.algorithms))
        hint = nearest(name, self.algorithms) or (f" Known here: {known}." if known else "")
        if not hint:
            hint = " No algorithm is registered. Install the package, so that its entry points are found."
        msg = f"unknown algorithm {name!r}.{hint}"
        raise PluginError(msg)

    def resolve(self, registry: str, given: Any) -> Any:
        """
        :param registry: ``"importance"``, ``"allocations"``, ``"schedules"`` or ``"latency_meters"``.
        :param given: a name in it, or a callable, which stands for itself.
        :return: the callable.
        :raises PluginError: with the nearest known name, or all of them.
        """
        if callable(given):
            return given
        known = getattr(self, registry)
        if given in known:
            return known[given]
        names = ", ".join(repr(key) for key in sorted(known)) or "none"
        msg = f"unknown {_NOUNS[registry]} {given!r}.{nearest(given, known)} Known here: {names}."
        raise PluginError(msg)

    def silent(self) -> Plugins:
        """The same offers, without listeners: what happens with it is a trial, and no event."""
        twin = copy.copy(self)
        twin._manager = pluggy.PluginManager(PROJECT_NAME)
        twin._manager.add_hookspecs(hookspecs)
        return twin

    def emit(self, kind: str, /, **payload: Any) -> None:
        """Tells every plugin that something happened.

        :param kind: the event's kind.
        :param payload: its particulars.
        """
        self._manager.hook.compactprune_event(event=Event(kind, payload))

    def _check_hooks(self, plugin: object, name: str) -> None:
        """Refuses misspelt hooks, hooks without their mark, and plugins without hooks."""
        marked = [n for n in dir(plugin) if self._manager.parse_hookimpl_opts(plugin, n) is not None]
        for attribute in marked:
            options: Mapping[str, Any] = self._manager.parse_hookimpl_opts(plugin, attribute) or {}
            hook = options.get("specname") or attribute
            if hook not in _HOOKS and not options.get("optionalhook"):
                raise _error(name, f"unknown hook {hook!r}.{nearest(str(hook), _HOOKS)}")
        for attribute in dir(plugin):
            value = inspect.getattr_static(plugin, attribute, None)
            specification = getattr(hookspecs, attribute, None)
            if attribute.startswith(_PREFIX) and attribute not in marked and value is not specification:
                raise _error(name, f"{attribute}() is not marked. Put @hookimpl above it")
        if not marked:
            raise _error(name, f"implements no hook. Expected some of {', '.join(sorted(_HOOKS))}, marked @hookimpl")

    def _offers(self, plugin: object, name: str) -> dict[tuple[str, Any], Any]:
        """Calls the plugin's registry hooks and checks what they return, changing nothing."""
        offers: dict[tuple[str, Any], Any] = {}
        for hook in sorted(_HOOKS - {_EVENT_HOOK}):
            registry = hook.removeprefix(_PREFIX)
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                for key, value in _call(name, hook, implementation.function):
                    owner = name if (registry, key) in offers else self._owners.get((registry, key))
                    if owner is not None:
                        shown = repr(key) if isinstance(key, str) else key.__qualname__
                        both = f"{owner!r} and {name!r}" if owner != name else f"{name!r} twice"
                        raise _error(name, f"{_NOUNS[registry]} {shown} is offered by {both}. Rename or remove one")
                    offers[registry, key] = value
        return offers


def _call(plugin: str, hook: str, function: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """Returns what a registry hook offers, as checked pairs of key and value."""
    by_class = hook == "compactprune_module_facts"
    try:
        result = function()
        offered = list(result.items() if isinstance(result, Mapping) else result) if _iterable(result) else None
    except Exception as error:
        raise _error(plugin, f"{hook}() raised {type(error).__name__}: {error}") from error
    if hook in _CHECKS:
        if offered is None or isinstance(result, Mapping):
            raise _error(plugin, f"{hook}() must return a list of classes, got {type(result).__name__}")
        return [(_CHECKS[hook](plugin, kind).name, kind) for kind in offered]
    if offered is None or not isinstance(result, Mapping):
        raise _error(plugin, f"{hook}() must return a mapping, got {type(result).__name__}")
    for key, value in offered:
        if not (isinstance(key, type) if by_class else isinstance(key, str) and key) or not callable(value):
            keys = "classes" if by_class else "names"
            raise _error(plugin, f"{hook}() must map {keys} to callables, got {key!r}: {value!r}")
    return offered


def _iterable(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _checked_algorithm(plugin: str, algorithm: Any) -> Any:
    """Returns the algorithm class; refuses what cannot be named, listed, validated or published."""
    if not isinstance(algorithm, type):
        raise _error(plugin, f"compactprune_algorithms() must return classes, got {algorithm!r}")
    for attribute in ("name", "summary"):
        value = getattr(algorithm, attribute, None)
        if not isinstance(value, str) or not value:
            reason = f"{algorithm.__qualname__}.{attribute} must be a non-empty string, got {value!r}"
            raise _error(plugin, reason)
    config = getattr(algorithm, "Config", None)
    if not (isinstance(config, type) and issubclass(config, BaseModel) and "algorithm" in config.model_fields):
        raise _error(plugin, f"{algorithm.__qualname__}.Config must be a subclass of AlgorithmConfig, got {config!r}")
    try:
        config.model_json_schema()
    except PydanticUserError as error:
        raise _error(plugin, f"{algorithm.__qualname__}.Config has no JSON schema: {error.message}") from error
    return algorithm


def _checked_format(plugin: str, kind: Any) -> Any:
    """Returns the format's class; refuses what has no name, no file name or nothing that writes and opens."""
    words = ("name", "title", "runtime", "suffix")
    wrong = [word for word in words if not isinstance(getattr(kind, word, None), str) or not getattr(kind, word)]
    if not isinstance(kind, type) or wrong or not kind.suffix.startswith("."):  # type: ignore[attr-defined]
        reason = "name, title, runtime and suffix ('.ending') must be words"
        raise _error(
            plugin, f"compactprune_export_formats() must return subclasses of ExportFormat, got {kind!r}: {reason}"
        )
    return kind


#: hooks that return classes, which name themselves
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "compactprune_algorithms": _checked_algorithm,
    "compactprune_export_formats": _checked_format,
}


def _error(plugin: str, reason: str) -> PluginError:
    return PluginError(f"plugin {plugin!r}: {reason}" + ("" if reason.endswith((".", "?")) else "."))


@functools.cache
def default_plugins() -> Plugins:
    """Returns the registry of everything installed. Entry points are loaded once in a process.

    :raises PluginError: if an installed plugin does not load or is refused.
    """
    plugins = Plugins()
    plugins.load_entry_points()
    return plugins
