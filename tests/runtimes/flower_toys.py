"""A small method and small clients for the tests of the Flower transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, Reply, Request, StateStore
from fedfuse.core.cohort import Cohort
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.journal import Journal
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS
from fedfuse.runtimes.flower.grid import GridRuntime
from flower_double import DoubleGrid, apps_of, node_of

NAME = "flower_toy"
IDS = ["a", "b", "c"]
SPEC = ModelSpec({"kind": "none"}, 0, (2,), 2)
WORKED: list[tuple[str, str]] = []
"""Client and exchange of every task that was really carried out."""


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    mode: str = ""

    @client_task(uploads=("w/*", "n"), state=True)
    def work(self, client: Any, msg: Payload) -> Payload:
        WORKED.append((client.id, str(msg.get("name", ""))))
        if self.mode == "fails" and client.id == "b":
            raise ZeroDivisionError("no luck")
        if self.mode == "breaks" and client.id == "b":
            return Payload({"secret": 1})
        client.state["count"] = int(client.state.get("count", 0)) + 1
        noise = torch.rand(3, generator=client.rng.torch("x")) + client.data.train.x.mean()
        return Payload(
            {"n": client.state["count"], "w/x": noise, "w/half": noise.bfloat16(), "w/zero": torch.zeros(50)}
        )


@contextmanager
def registered() -> Iterator[None]:
    """The method is known for a while."""
    register_method(NAME)(Toy)
    WORKED.clear()
    try:
        yield
    finally:
        del METHODS._entries[NAME], METHODS._facts[NAME]


def toy_side(client_id: str, folder: Path, value: float | None = None) -> ClientSide:
    """A client with a few examples that depend on its name, or on a value."""
    value = float(ord(client_id[-1])) if value is None else value
    examples = Examples(torch.full((3, 2), value), torch.zeros(3, dtype=torch.int64))
    return ClientSide(client_id, ClientData(examples, examples, 2), SPEC, states=StateStore(folder / "states"))


class Federation:
    """Three clients behind the double, and a server."""

    def __init__(self, home: Path, mode: str = "", ids: list[str] | None = None, **settings: Any) -> None:
        self.home, self.method, self.ids = home, Toy(mode=mode), ids or IDS
        self.nodes = {name: node_of(toy_side(name, home / name), home / name) for name in self.ids}
        self.grid = DoubleGrid(apps_of(list(self.nodes.values())))
        self.node_ids = dict(zip(self.ids, self.grid.apps, strict=True))
        self.lines: list[dict[str, Any]] = []
        self.settings = {"expected": self.ids, "members": home / "server" / "members.json", "poll_s": 0.0, **settings}

    def server(self, **changes: Any) -> GridRuntime:
        """A server process's runtime; a second one stands for a restart."""
        settings = {**self.settings, **changes}
        return GridRuntime(self.grid, agreement=b"agreed", log=lambda facts: self.lines.append(dict(facts)), **settings)

    def cohort(self, runtime: GridRuntime, journal: Journal | None = None) -> Cohort:
        """The cohort over a runtime."""
        return Cohort(runtime=runtime, method=self.method, model_of=lambda name: SPEC, seed=1, journal=journal)

    def request(self, name: str, key: str = "0" * 40, **changes: Any) -> Request:
        """A question to a client, beside any cohort."""
        settings = {"mode": self.method.mode}
        values = {"method": NAME, "settings": settings, "task": "work", "exchange": "first", "client_id": name}
        return Request(**{**values, "seed": 1, "lineage": "", "answer_key": key, "payload": PAYLOAD, **changes})

    def ask(self, runtime: GridRuntime, requests: list[Request], timeout_s: float | None = None) -> list[Reply]:
        """All replies of one exchange."""
        return list(runtime.exchange(requests, timeout_s=timeout_s, progress=no_progress))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of the log of one kind."""
        return [line for line in self.lines if line["event"] == kind]


PAYLOAD = Payload({"name": "first"}).encode()


def no_progress(client_id: str, done: int, total: int) -> None:
    pass


def key_of(number: int) -> str:
    """An answer key."""
    return f"{number:040x}"
