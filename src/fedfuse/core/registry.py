"""Doors: names to classes or functions, built in or brought by third parties.

A registry knows the package where the built-in entries live and imports it at the first look-up, so that
``import fedfuse`` stays cheap. Third parties add theirs through Python entry points of the same group.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fedfuse.core.errors import RegistryError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries of one kind.

    Args:
        kind: the word for one entry in messages, such as ``"method"``.
        home: the package whose import registers the built-in entries; also the group of the entry points.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, T] = {}
        self._facts: dict[str, dict[str, str]] = {}
        self._is_loaded = False
        self.failed_entry_points: dict[str, str] = {}

    def register(self, name: str, **facts: str) -> Callable[[T], T]:
        """Register the decorated class or function.

        Args:
            name: the name in configurations; lower case.
            facts: what lists show beside it, such as ``paper``.

        Returns:
            The decorator; it returns what it decorates.

        Raises:
            RegistryError: the name is taken by something else.
        """

        def add(entry: T) -> T:
            old = self._entries.get(name)
            if old is not None and not _is_same_source(old, entry):
                raise RegistryError(
                    f'the {self.kind} "{name}" is registered twice',
                    where=f"{_place(old)} and {_place(entry)}",
                    fix="give one of them another name",
                )
            self._entries[name] = entry
            # A plug-in that registers itself when it is loaded is registered once more, without its facts.
            self._facts[name] = dict(facts) or self._facts.get(name, {})
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry of that name.

        Args:
            name: as registered.

        Raises:
            RegistryError: no such entry; the message names the nearest one.
        """
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            fix = did_you_mean(name, self._entries)
            if name in self.failed_entry_points:
                fix = f"its plug-in failed to import: {self.failed_entry_points[name]}"
            raise RegistryError(f'there is no {self.kind} "{name}"', fix=fix)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names in sorted order."""
        self._load()
        return sorted(self._entries)

    def summary(self, name: str) -> str:
        """First line of the entry's docstring."""
        return (inspect.getdoc(self.get(name)) or "").split("\n", 1)[0]

    def facts(self, name: str) -> dict[str, str]:
        """What was registered beside the entry, such as ``paper``."""
        self.get(name)
        return dict(self._facts[name])

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        importlib.import_module(self.home)
        for point in importlib.metadata.entry_points(group=self.home):
            # A broken plug-in must not take the built-in names down with it; it is told when it is asked for.
            try:
                # Loading a plug-in usually registers it already; the same thing twice is fine, two things are not.
                self.register(point.name)(point.load())
            except RegistryError:
                raise
            except Exception as error:
                self.failed_entry_points[point.name] = f"{type(error).__name__}: {error}"


def _place(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"


def _is_same_source(old: object, new: object) -> bool:
    """A module that is imported again (reload, doctest, ``__main__``) registers the same thing anew."""
    return _place(old) == _place(new)


METHODS: Registry[Any] = Registry("method", "fedfuse.methods")
RULES: Registry[Any] = Registry("rule", "fedfuse.rules")
ADAPTER_RULES: Registry[Any] = Registry("adapter rule", "fedfuse.rules.adapters")
PARTITIONS: Registry[Any] = Registry("partition", "fedfuse.data.partitions")
SOURCES: Registry[Any] = Registry("source", "fedfuse.data.sources")
MODELS: Registry[Any] = Registry("model", "fedfuse.models")
RECIPES: Registry[Any] = Registry("recipe", "fedfuse.models")
RUNTIMES: Registry[Any] = Registry("runtime", "fedfuse.runtimes")
ATTACKS: Registry[Any] = Registry("attack", "fedfuse.data.attacks")
CODECS: Registry[Any] = Registry("codec", "fedfuse.core.codecs")

register_rule = RULES.register
register_adapter_rule = ADAPTER_RULES.register
register_partition = PARTITIONS.register
register_source = SOURCES.register
register_model = MODELS.register
register_recipe = RECIPES.register
register_runtime = RUNTIMES.register
register_attack = ATTACKS.register
register_codec = CODECS.register
