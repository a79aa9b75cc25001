"""Flower's grid in one process: calls ClientApps directly, and does wrong on demand.

Every message is taken apart and put together as on the way through a SuperLink, so what cannot travel fails here too.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedfuse.core.client import ClientSide
from fedfuse.core.registry import register_runtime
from fedfuse.core.sealing import SigningKey
from fedfuse.runtimes.flower.grid import GridRuntime
from fedfuse.runtimes.flower.node import Node, build_client_app

Fault = Callable[[Message, Message], "Sequence[Message] | None"]
"""Gets a question and the honest reply; returns what comes back instead, or ``None`` to let the honest one through."""


def over_the_wire(message: Message) -> Message:
    """The message as it is after its way through Flower."""
    objects = get_all_nested_objects(message)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    arrived = cast(Message, inflate_object_from_contents(message.object_id, contents))
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived


class DoubleGrid(Grid):
    """Nodes in this process.

    Args:
        apps: node id to its app.
    """

    def __init__(self, apps: Mapping[int, ClientApp] | None = None) -> None:
        self.apps = dict(apps or {})
        self.faults: list[Fault] = []
        self.sent: list[Message] = []
        self.seen: list[Message] = []
        self.frozen: set[int] = set()
        self.activated: dict[int, str] = {}
        self._waiting: dict[str, Message] = {}
        self._run = Run.create_empty(1)
        # A process has one identity; the server and all clients share it here.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=i, last_activated_at=self.activated.get(i, "")) for i in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self.apps:
                continue
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            arrived = over_the_wire(message)
            self.sent.append(arrived)
            self._waiting[arrived.metadata.message_id] = arrived
            ids.append(arrived.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies: list[Message] = []
        for message_id in message_ids:
            question = self._waiting.get(message_id)
            if question is None or question.metadata.dst_node_id in self.frozen:
                continue
            del self._waiting[message_id]
            replies += self._answers(question)
        self.seen += replies
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answers(self, question: Message) -> Sequence[Message]:
        node_id = question.metadata.dst_node_id
        if node_id not in self.apps:
            return [failure(question, ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")]
        context = Context(1, node_id, {}, RecordDict(), {})
        reply = over_the_wire(self.apps[node_id](question, context))
        for fault in self.faults:
            instead = fault(question, reply)
            if instead is not None:
                return instead
        return [reply]

    def later(self, question: Message) -> None:
        """Answer this question only at the next look."""
        self._waiting[question.metadata.message_id] = question


def failure(question: Message, code: int, reason: str) -> Message:
    """What Flower says when a node cannot answer."""
    return Message(Error(code, reason), reply_to=question)


def node_of(side: ClientSide, home: Path, **others: Any) -> Node:
    """A node that carries a client of a simulation."""
    key = SigningKey.load_or_make(home / "key.pem")
    return Node(**{"name": side.id, "key": key, "home": home, "side": lambda agreement: side, **others})


def apps_of(nodes: Sequence[Node]) -> dict[int, ClientApp]:
    """Node ids, as large as Flower's, to apps."""
    return {(1 << 62) + i: build_client_app(lambda context, node=node: node) for i, node in enumerate(nodes)}  # type: ignore[misc]


@register_runtime("flower-double")
@dataclass(frozen=True, kw_only=True)
class FlowerDouble:
    """Every client of a simulation behind the Flower transport, in this process."""

    codec: str = "none"
    chunk_bytes: int = 64 << 20

    def open(self, sides: Mapping[str, ClientSide]) -> DoubleRuntime:
        return DoubleRuntime(sides, self)


class DoubleRuntime(GridRuntime):
    """The running form of :class:`FlowerDouble`."""

    def __init__(self, sides: Mapping[str, ClientSide], settings: FlowerDouble) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="fedfuse-")
        folder = Path(self._home.name)
        self.nodes = [node_of(side, folder / client_id) for client_id, side in sorted(sides.items())]
        self.grid = DoubleGrid(apps_of(self.nodes))
        super().__init__(
            self.grid,
            agreement=b"agreed",
            expected=sorted(sides),
            members=folder / "members.json",
            codec=settings.codec,
            chunk_bytes=settings.chunk_bytes,
            poll_s=0.0,
        )

    def close(self) -> None:
        super().close()
        self._home.cleanup()
