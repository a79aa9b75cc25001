"""The contract of a method: frozen settings, client tasks, and one server procedure."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact, ModelSpec
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.client import Client
from fedfuse.core.errors import RegistryError, TaskError
from fedfuse.core.examples import Examples, InputSpace
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS
from fedfuse.core.seeding import Rng

if TYPE_CHECKING:
    from fedfuse.core.cohort import Cohort

Task = Callable[[Client, Payload], Payload]
"""A client task bound to its method: what ``cohort.ask`` takes."""

F = TypeVar("F", bound=Callable[[Any, Client, Payload], Payload])
M = TypeVar("M", bound="type[Method]")

_MARK = "__client_task__"


@dataclass(frozen=True)
class TaskSpec:
    """What a client task declares.

    Args:
        name: name of the method's function.
        uploads: pattern of keys to a few words on what they are: everything that may leave the client.
        settings: names of the method's settings that the task reads; ``None`` means all.
        keeps_state: whether the task reads or writes ``client.state``.
        identity: module and name of the function where it is defined, and a digest of its source; two methods that
            inherit the same task ask the same question.
    """

    name: str
    uploads: Mapping[str, str]
    settings: tuple[str, ...] | None
    keeps_state: bool
    identity: str


def client_task(
    *, uploads: Sequence[str] | Mapping[str, str], settings: Sequence[str] | None = None, state: bool = False
) -> Callable[[F], F]:
    """Declare a function of a method as a client task: ``(self, client, msg) -> Payload``.

    The task runs on the client's side. It sees the client, the message, and those settings of the method that it
    declares. What it declares decides which earlier answers can be used again: see the journal.

    Args:
        uploads: keys or ``group/*`` patterns that it may upload, best as a table with a few words on each.
        settings: names of the method's settings that it reads; left out, all of them.
        state: whether it reads or writes ``client.state``, which stays at the client from exchange to exchange.

    Returns:
        The decorator; it returns the function itself.

    Example:
        >>> @client_task(uploads={"num_examples": "how many examples the client trains on"}, settings=())
        ... def count(self, client, msg):
        ...     return Payload({"num_examples": len(client.data.train)})
    """
    declared = dict(uploads) if isinstance(uploads, Mapping) else dict.fromkeys(uploads, "")

    def mark(function: F) -> F:
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            source = ""
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        spec = TaskSpec(
            name=function.__name__,
            uploads=types.MappingProxyType(declared),
            settings=None if settings is None else tuple(settings),
            keeps_state=state,
            identity=f"{function.__module__}:{function.__qualname__}@{digest}",
        )
        setattr(function, _MARK, spec)
        return function

    return mark


def task_spec(function: object) -> TaskSpec | None:
    """What a function declares with :func:`client_task`; nothing if it is no client task.

    Args:
        function: a function, bound or not.
    """
    spec = getattr(function, _MARK, None)
    return spec if isinstance(spec, TaskSpec) else None


@dataclass(frozen=True)
class Job:
    """What the server knows.

    Args:
        model: architecture and first weights that clients own unless ``client_models`` says otherwise.
        client_models: client id to its own model, for heterogeneous clients.
        server_data: data of the server's own, if declared; never the test set.
        rng: the server's random source.
        device: where the server computes.
        progress: called with (what, done, total) during long server work.
        facts: numbers and strings that the method reports about itself, shown in the report.
        inputs: what the models' inputs look like.
        checkpoints: where long server work keeps what it has.
        picture: called with a name and images ``(n, channels, height, width)`` in [0, 1], to be shown in the report.
    """

    model: ModelSpec
    rng: Rng
    device: torch.device
    client_models: Mapping[str, ModelSpec] = field(default_factory=dict)
    server_data: Examples | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    facts: dict[str, Any] = field(default_factory=dict)
    inputs: InputSpace = field(default_factory=InputSpace)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    picture: Callable[[str, Tensor], None] = lambda name, images: None

    def note(self, text: str) -> None:
        """Say something in words about this run, once; shown in the report.

        Args:
            text: one sentence.
        """
        notes = self.facts.setdefault("notes", [])
        if text not in notes:
            notes.append(text)

    def model_of(self, client_id: str) -> ModelSpec:
        """The model that a client owns.

        Args:
            client_id: its id.
        """
        return self.client_models.get(client_id, self.model)


@dataclass(frozen=True)
class Fused:
    """What a method gives back.

    Args:
        model: the one model for everybody; ``None`` where there is none (local training, personalised methods).
        personal: client id to a model of its own.
    """

    model: Artifact | None = None
    personal: Mapping[str, Artifact] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. A subclass is a frozen dataclass of settings, registered by name."""

    name: ClassVar[str] = ""
    needs_server_data: ClassVar[bool] = False
    """Whether it refuses to run where the server has no data of its own."""
    takes_heterogeneous: ClassVar[bool] = True
    """Whether clients may own models of different architectures."""
    is_additive: ClassVar[bool] = False
    """Whether what a client uploads depends on no other client, so that clients can come and go one by one."""
    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Of a method whose server computes from sums and weighted means of its uploads alone: name of a task to the
    pattern of its keys to the key of their weight, empty for a plain sum. With secure aggregation the server gets one
    reply that holds those. It is not inherited: a subclass's server may look at more."""

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """The server's procedure, top to bottom: ask clients, compute, return.

        Args:
            cohort: the clients; everything that crosses goes through ``cohort.ask``.
            job: the model, the server's random source, its data if declared.

        Returns:
            The result.
        """
        raise NotImplementedError

    @classmethod
    def summed_tasks(cls) -> Mapping[str, Mapping[str, str]]:
        """:attr:`sums` as this very class declares them; empty if its server needs to see single uploads."""
        return dict(cls.__dict__.get("sums", {}))

    @classmethod
    def tasks(cls) -> dict[str, TaskSpec]:
        """All client tasks by name: what may ever leave a client under this method."""
        found = {}
        for name in sorted(dir(cls)):
            spec = task_spec(inspect.getattr_static(cls, name))
            if spec is not None:
                found[name] = spec
        return found


def register_method(name: str, *, paper: str = "", reference: str = "") -> Callable[[M], M]:
    """Register a method under its paper's name.

    Args:
        name: the key in configurations; also the module's name and the card's.
        paper: where it is published.
        reference: authors, venue and year, for lists.

    Returns:
        The class decorator.
    """

    def add(cls: M) -> M:
        where = f"{cls.__module__}.{cls.__qualname__}"
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise RegistryError(
                f'the method "{name}" is no subclass of fedfuse.Method',
                where=where,
                fix="derive it from fedfuse.Method",
            )
        params = cls.__dict__.get("__dataclass_params__")
        if params is None or not params.frozen:
            raise RegistryError(
                f'the method "{name}" is no frozen dataclass',
                where=where,
                fix="put @dataclass(frozen=True, kw_only=True) under @register_method",
            )
        known = {f.name for f in dataclasses.fields(cls)}
        for spec in cls.tasks().values():
            unknown = sorted(set(spec.settings or ()) - known)
            if unknown:
                raise RegistryError(
                    f'the task "{spec.name}" declares a setting that the method "{name}" lacks: {unknown[0]}',
                    where=where,
                    fix=f"its settings are: {', '.join(sorted(known)) or 'none'}",
                )
        cls.name = name
        METHODS.register(name, paper=paper, reference=reference)(cls)
        return cls

    return add


class TaskView:
    """A method as its client task sees it: the settings that it declared, and the class's functions.

    Reading another setting raises, because the answer would then depend on something that the journal's key lacks.
    """

    def __init__(self, method: Method, spec: TaskSpec) -> None:
        names = [f.name for f in dataclasses.fields(method)] if spec.settings is None else spec.settings
        self.__dict__.update({name: getattr(method, name) for name in names})
        self.__dict__["_method_class"] = type(method)
        self.__dict__["_task"] = spec.name

    def __getattr__(self, name: str) -> Any:
        cls = self.__dict__["_method_class"]
        if any(f.name == name for f in dataclasses.fields(cls)):
            raise TaskError(
                f'the task "{self._task}" reads the setting "{name}" that it did not declare',
                where=f"{cls.__module__}.{cls.__qualname__}",
                fix=f'add "{name}" to @client_task(settings=...)',
            )
        attribute = inspect.getattr_static(cls, name)
        if isinstance(attribute, types.FunctionType):
            return types.MethodType(attribute, self)
        if isinstance(attribute, property) and attribute.fget:
            return attribute.fget(self)
        if isinstance(attribute, functools.cached_property):
            return attribute.func(self)
        return getattr(cls, name)

    def __setattr__(self, name: str, value: object) -> None:
        raise TaskError(
            f'the task "{self._task}" sets "{name}" on its method', fix="keep what must last in client.state"
        )
