"""Methods: what registration refuses, and what a client task may see of its method."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import RegistryError, TaskError
from fedfuse.core.method import Job, Method, TaskView, client_task, register_method, task_spec
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS
from fedfuse.core.seeding import Rng

NAME = "method_test"


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was() -> Iterator[None]:
    before = set(METHODS.names())
    yield
    for name in set(METHODS._entries) - before:
        del METHODS._entries[name], METHODS._facts[name]


@dataclass(frozen=True, kw_only=True)
class Base(Method):
    a: int = 1
    b: int = 2
    shared: ClassVar[str] = "of the class"

    @property
    def double(self) -> int:
        return 2 * self.a

    @property
    def reads_b(self) -> int:
        return self.b

    @functools.cached_property
    def triple(self) -> int:
        return 3 * self.a

    def plus(self, number: int) -> int:
        return self.double + number

    @staticmethod
    def constant() -> int:
        return 42

    @classmethod
    def kind(cls) -> str:
        return cls.__name__

    @client_task(uploads={"w/*": "weights", "n": "how many"}, settings=("a",), state=True)
    def task(self, client: Any, msg: Payload) -> Payload:
        return Payload()

    @client_task(uploads=("n",))
    def everything(self, client: Any, msg: Payload) -> Payload:
        return Payload()


@dataclass(frozen=True, kw_only=True)
class Heir(Base):
    c: int = 3


@dataclass(frozen=True, kw_only=True)
class Rewriter(Base):
    @client_task(uploads=("n",), settings=("a",))
    def task(self, client: Any, msg: Payload) -> Payload:
        return Payload({"n": 1})


def view(method: Method, task: str = "task") -> Any:
    return TaskView(method, method.tasks()[task])


# --- registration


def test_a_method_is_known_by_its_name() -> None:
    assert register_method(NAME, paper="url", reference="They, 2024")(Base) is Base
    assert METHODS.get(NAME) is Base
    assert Base.name == NAME
    assert METHODS.facts(NAME) == {"paper": "url", "reference": "They, 2024"}


def refused(cls: Any) -> str:
    with pytest.raises(RegistryError) as caught:
        register_method(NAME)(cls)
    assert NAME not in METHODS.names()
    where = f"\n  where: {cls.__module__}.{cls.__qualname__}"
    text = str(caught.value)
    assert where in text
    return text.replace(where, "")


def test_what_is_no_method_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Alien:
        pass

    def function() -> None:
        pass

    wanted = f'the method "{NAME}" is no subclass of fedfuse.Method\n  fix:   derive it from fedfuse.Method'
    assert refused(Alien) == wanted
    assert refused(function) == wanted


def test_a_method_that_is_no_frozen_dataclass_of_its_own_is_refused() -> None:
    class Plain(Method):
        pass

    class Undecorated(Base):
        pass

    wanted = (
        f'the method "{NAME}" is no frozen dataclass\n'
        "  fix:   put @dataclass(frozen=True, kw_only=True) under @register_method"
    )
    assert refused(Plain) == wanted
    assert refused(Undecorated) == wanted


def test_a_task_that_declares_a_setting_that_is_none_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Method):
        b: int = 1
        a: int = 1

        @client_task(uploads=(), settings=("a", "x", "c"))
        def task(self, client: Any, msg: Payload) -> Payload:
            return Payload()

    assert refused(Wrong) == (
        f'the task "task" declares a setting that the method "{NAME}" lacks: c\n  fix:   its settings are: a, b'
    )


def test_a_name_that_is_taken_is_refused_and_both_places_are_named() -> None:
    register_method(NAME)(Base)
    with pytest.raises(RegistryError) as caught:
        register_method(NAME)(Heir)
    assert str(caught.value) == (
        f'the method "{NAME}" is registered twice\n'
        f"  where: {__name__}.Base and {__name__}.Heir\n"
        "  fix:   give one of them another name"
    )
    assert METHODS.get(NAME) is Base


def test_the_server_procedure_is_the_methods_own() -> None:
    with pytest.raises(NotImplementedError):
        Base().fuse(None, None)  # type: ignore[arg-type]


# --- declarations


def test_a_declaration_is_kept_with_the_function() -> None:
    spec = task_spec(Base.task)
    assert spec is not None
    assert spec is task_spec(Base().task)
    assert (spec.name, dict(spec.uploads), spec.settings) == ("task", {"w/*": "weights", "n": "how many"}, ("a",))
    assert spec.keeps_state
    every = task_spec(Base.everything)
    assert every is not None
    assert (dict(every.uploads), every.settings, every.keeps_state) == ({"n": ""}, None, False)
    assert list(Base.tasks()) == ["everything", "task"]


def test_what_is_no_task_declares_nothing() -> None:
    assert task_spec(Base.plus) is None
    assert task_spec(3) is None
    assert Method.tasks() == {}


def test_methods_that_inherit_a_task_ask_the_same_question() -> None:
    assert Heir.tasks() == Base.tasks()
    assert Heir.tasks()["task"].identity.startswith(f"{__name__}:Base.task@")
    assert Rewriter.tasks()["everything"] == Base.tasks()["everything"]
    assert Rewriter.tasks()["task"].identity.startswith(f"{__name__}:Rewriter.task@")


def test_the_identity_of_a_task_sees_its_source() -> None:
    def first() -> Any:
        @client_task(uploads=("n",))
        def task(self: Any, client: Any, msg: Payload) -> Payload:
            return Payload({"n": 1})

        return task

    def second() -> Any:
        @client_task(uploads=("n",))
        def task(self: Any, client: Any, msg: Payload) -> Payload:
            return Payload({"n": 2})

        return task

    identities = [spec.identity.split("@")[1] for make in (first, second, first) if (spec := task_spec(make()))]
    assert identities[0] == identities[2] != identities[1]


# --- what a task sees


def test_a_task_reads_the_settings_that_it_declared() -> None:
    assert view(Base(a=5)).a == 5
    assert (view(Base(a=5, b=6), "everything").a, view(Base(b=6), "everything").b) == (5, 6)
    assert view(Heir(c=7), "everything").c == 7


@pytest.mark.parametrize("name", ["b", "reads_b"])
def test_a_setting_that_was_not_declared_raises(name: str) -> None:
    with pytest.raises(TaskError) as caught:
        getattr(view(Base()), name)
    assert str(caught.value) == (
        'the task "task" reads the setting "b" that it did not declare\n'
        f"  where: {__name__}.Base\n"
        '  fix:   add "b" to @client_task(settings=...)'
    )


def test_what_the_class_offers_works_on_the_declared_settings() -> None:
    seen = view(Heir(a=5))
    assert seen.double == 10
    assert seen.plus(1) == 11
    assert seen.constant() == 42
    assert seen.kind() == "Heir"
    assert seen.shared == "of the class"
    assert seen.task(None, Payload()).digest() == Payload().digest()


def test_a_cached_property_works_too() -> None:
    assert view(Base(a=5)).triple == 15


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        view(Base()).nothing  # noqa: B018


@pytest.mark.parametrize("name", ["a", "b", "new"])
def test_a_task_cannot_keep_anything_on_its_method(name: str) -> None:
    with pytest.raises(TaskError) as caught:
        setattr(view(Base()), name, 1)
    assert str(caught.value) == (
        f'the task "task" sets "{name}" on its method\n  fix:   keep what must last in client.state'
    )


# --- the job


def test_a_client_owns_the_common_model_unless_it_has_its_own() -> None:
    common, own = (ModelSpec({"kind": kind}, 0, (1,), 2) for kind in ("a", "b"))
    job = Job(model=common, rng=Rng(0), device=torch.device("cpu"), client_models={"x": own})
    assert job.model_of("x") is own
    assert job.model_of("y") is common
