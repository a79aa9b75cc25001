"""Registry: names once and for all, near misses, and plug-ins that fail alone."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fedfuse.core.errors import RegistryError
from fedfuse.core.registry import METHODS, MODELS, PARTITIONS, RECIPES, RULES, RUNTIMES, SOURCES, Registry


@dataclass
class Point:
    """Stands for an entry point of an installed package."""

    name: str
    load: Callable[[], object]


def one() -> None:
    """The first.

    More words.
    """


def two() -> None:
    pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    return Registry("rule", "json")


def plug_in(monkeypatch: pytest.MonkeyPatch, *points: Point) -> list[str]:
    groups: list[str] = []

    def entry_points(*, group: str) -> list[Point]:
        groups.append(group)
        return list(points)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return groups


def test_what_is_registered_is_found(registry: Registry[object]) -> None:
    assert registry.register("one", paper="p")(one) is one
    registry.register("a_two")(two)
    assert registry.get("one") is one
    assert registry.names() == ["a_two", "one"]
    assert registry.summary("one") == "The first."
    assert registry.summary("a_two") == ""
    assert registry.facts("one") == {"paper": "p"}
    assert registry.facts("a_two") == {}


def test_facts_cannot_be_changed_from_outside(registry: Registry[object]) -> None:
    registry.register("one", paper="p")(one)
    registry.facts("one")["paper"] = "q"
    assert registry.facts("one") == {"paper": "p"}


def test_a_second_entry_of_a_name_names_both_places(registry: Registry[object]) -> None:
    registry.register("one")(one)
    with pytest.raises(RegistryError) as caught:
        registry.register("one")(two)
    assert str(caught.value) == (
        'the rule "one" is registered twice\n'
        f"  where: {__name__}.one and {__name__}.two\n"
        "  fix:   give one of them another name"
    )
    assert registry.get("one") is one


def test_the_same_source_may_be_registered_again(registry: Registry[object]) -> None:
    # Reloading a module makes a new object of the same module and name.
    def reloaded() -> None:
        pass

    registry.register("one")(one)
    reloaded.__qualname__ = "one"
    registry.register("one")(reloaded)
    assert registry.get("one") is reloaded


def test_an_unknown_name_is_told_the_nearest(registry: Registry[object]) -> None:
    registry.register("median")(one)
    with pytest.raises(RegistryError) as caught:
        registry.get("medain")
    assert str(caught.value) == 'there is no rule "medain"\n  fix:   did you mean "median"? known: median'


def test_plug_ins_are_looked_up_once_under_the_registrys_home(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = plug_in(monkeypatch, Point("theirs", lambda: two))
    registry: Registry[object] = Registry("rule", "json")
    assert registry.names() == ["theirs"]
    assert registry.get("theirs") is two
    assert registry.names() == ["theirs"]
    assert groups == ["json"]


def test_a_plug_in_that_registers_itself_when_loaded_keeps_its_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[object] = Registry("rule", "json")
    plug_in(monkeypatch, Point("theirs", lambda: registry.register("theirs", paper="p")(two)))
    assert registry.names() == ["theirs"]
    assert registry.facts("theirs") == {"paper": "p"}


def test_a_plug_in_that_fails_is_told_when_asked_for_and_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise ImportError("no module named nothing")

    plug_in(monkeypatch, Point("bad", broken), Point("good", lambda: two))
    registry: Registry[object] = Registry("rule", "json")
    registry.register("own")(one)
    assert registry.names() == ["good", "own"]
    assert registry.failed_entry_points == {"bad": "ImportError: no module named nothing"}
    with pytest.raises(RegistryError) as caught:
        registry.get("bad")
    assert str(caught.value) == (
        'there is no rule "bad"\n  fix:   its plug-in failed to import: ImportError: no module named nothing'
    )


def test_a_plug_in_cannot_take_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, Point("one", lambda: two))
    registry: Registry[object] = Registry("rule", "json")
    registry.register("one")(one)
    with pytest.raises(RegistryError) as caught:
        registry.names()
    assert caught.value.what == 'the rule "one" is registered twice'
    assert caught.value.where == f"{__name__}.one and {__name__}.two"


@pytest.mark.parametrize("registry", [METHODS, RULES, PARTITIONS, SOURCES, MODELS, RECIPES, RUNTIMES])
def test_every_door_opens_and_every_entry_says_what_it_is(registry: Registry[object]) -> None:
    own = {name: entry for name in registry.names() if is_ours(entry := registry.get(name))}
    assert own
    for name in own:
        assert name == name.lower()
        assert registry.summary(name)


def is_ours(entry: object) -> bool:
    return str(getattr(entry, "__module__", "")).startswith("fedfuse.")
