"""Faults of what comes over Flower: nodes of which one lies, floods, hangs or comes back, and two hundred at once.

The grid is the one of the tests: it takes every message apart and puts it together as a SuperLink does, in this
process. Real processes are tried by ``deployment.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from federation import FEDAVG, FUSEFL, asked_again, changed, digest, replies, undisturbed, warm
from outcome import ALL_THERE, SAME, Seen, Skipped, check, fault, said

FAMILY = "over Flower, one node at fault"
LOAD_FAMILY = "load"
LAST = "client_4"
Spoiled = Callable[[Any, Any], "Sequence[Any] | None"]
"""Gets a question and the honest reply of the last client; gives what comes instead."""


@dataclass
class Network:
    """The clients of a simulation behind an in-process grid; servers may come and go.

    Args:
        home: for everything.
        config: of the simulation.
        settings: of the server's runtime.
    """

    home: Path
    config: Mapping[str, Any] = field(default_factory=lambda: FEDAVG)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        warm()
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
        try:
            import flower_double
        except ImportError as error:
            raise Skipped(f"Flower is not installed: {error}") from None
        from fedfuse.core.client import ClientSide, StateStore
        from fedfuse.experiment.configuration import read_config
        from fedfuse.experiment.setting import Loader

        self.out = self.home / "run"
        self.checked = read_config(dict(self.config))
        self.setting = Loader(self.checked).setting(self.checked.seed)
        self.nodes = {}
        for name, data in sorted(self.setting.data.clients.items()):
            folder = self.home / "clients" / name
            side = ClientSide(name, data, self.setting.model, states=StateStore(folder / "states"))
            self.nodes[name] = flower_double.node_of(side, folder)
        self.grid = flower_double.DoubleGrid(flower_double.apps_of(list(self.nodes.values())))
        self.node_ids = dict(zip(self.nodes, self.grid.apps, strict=True))
        self.log: list[Mapping[str, Any]] = []

    def serve(self, **settings: Any) -> Any:
        """Run the server's side to its end; a second time is a restart.

        Args:
            settings: of the runtime.

        Returns:
            The result.
        """
        from fedfuse.core.registry import METHODS
        from fedfuse.experiment import Observer
        from fedfuse.experiment.configuration import named, resolve
        from fedfuse.experiment.running import run_method
        from fedfuse.runtimes.flower.grid import GridRuntime

        terms = {"members": self.out / "members.json", "poll_s": 0.0, "expected": sorted(self.nodes)}
        runtime = GridRuntime(
            self.grid, agreement=b"agreed", log=self.log.append, **{**terms, **self.settings, **settings}
        )
        method = named(METHODS, self.checked.method.name, self.checked.method.others, "method")
        try:
            return run_method(
                self.setting,
                method,
                self.checked,
                resolve(self.checked),
                label=method.name,
                folder=self.out,
                observer=Observer(),
                runtime=runtime,
            )
        finally:
            runtime.close()

    def spoil(self, kind: str, then: Spoiled, name: str = LAST) -> None:
        """Let something else come back from one client, for every message of a kind.

        Args:
            kind: type of message.
            then: what comes instead.
            name: the client.
        """
        node_id = self.node_ids[name]

        def at_fault(question: Any, reply: Any) -> Sequence[Any] | None:
            if question.metadata.message_type != kind or question.metadata.dst_node_id != node_id:
                return None
            return then(question, reply)

        self.grid.faults.append(at_fault)


def answered_with(change: Callable[[Any], tuple[Any, Any]], network: Network) -> Spoiled:
    """A reply that is sealed anew with something changed.

    Args:
        change: gets the honest reply; gives another one and the key that seals it.
        network: the clients.
    """

    def then(question: Any, reply: Any) -> list[Any]:
        from flwr.app import Message

        from fedfuse.core.client import Reply
        from fedfuse.core.sealing import unseal
        from fedfuse.runtimes.flower.codec import decode_message, encode_message, seal_reply

        header, body = decode_message(reply.content, max_bytes=1 << 30)
        sealed = unseal(body, max_bytes=1 << 30)
        honest = Reply(
            sealed.text("client_id"), upload=sealed.parts["upload"], answer_key=sealed.text("answer_key"), seconds=0.1
        )
        changed_reply, key = change(honest)
        return [Message(encode_message(header, seal_reply(changed_reply, key)), reply_to=question)]

    return then


def tried(home: Path, spoil: Callable[[Network], None], *wanted: str, config: Mapping[str, Any] = FEDAVG) -> Seen:
    """One client of five at fault; then it is honest again.

    Args:
        home: the trial's folder.
        spoil: arranges the fault.
        wanted: what must be said.
        config: of the run.
    """
    from fedfuse.core.errors import QuorumError

    expected = undisturbed(config, home.parent)
    network = Network(home, config)
    spoil(network)
    try:
        network.serve(deadline_s=3.0)
    except QuorumError as error:
        told = said(f"error: {error}", *wanted)
    else:
        raise AssertionError("it was fused all the same")
    before = replies(network.out)
    check(len(before) == len(network.nodes) - 1, f"{len(before)} replies were journaled")
    network.grid.faults.clear()
    network.serve()
    check(before <= replies(network.out), "an accepted reply is lost")
    check(digest(network.out) == expected, "another digest")
    check([client for _, client in asked_again(network.out)] == [LAST], f"asked again: {asked_again(network.out)}")
    return Seen("missing, with the reason; the others' answers are kept and were not asked for again", ALL_THERE, told)


def _task() -> str:
    from fedfuse.runtimes.flower.node import TASK

    return TASK


def _sealed(home: Path, change: Callable[[Network, Any], tuple[Any, Any]], *wanted: str) -> Seen:
    def spoil(network: Network) -> None:
        network.spoil(_task(), answered_with(lambda honest: change(network, honest), network))

    return tried(home, spoil, *wanted)


@fault(FAMILY, "sends garbage")
def garbage(home: Path) -> Seen:
    """Random bytes in the frame of an answer."""

    def then(question: Any, reply: Any) -> list[Any]:
        from flwr.app import Message

        from fedfuse.runtimes.flower.codec import encode_message

        return [Message(encode_message({"kind": "answer"}, os.urandom(5000)), reply_to=question)]

    return tried(home, lambda network: network.spoil(_task(), then), "the sealed message was refused")


@fault(FAMILY, "sends no message of fedfuse at all")
def foreign(home: Path) -> Seen:
    """Flower's records with something else in them."""

    def then(question: Any, reply: Any) -> list[Any]:
        from flwr.app import ConfigRecord, Message, RecordDict

        return [Message(RecordDict({"x": ConfigRecord({"y": 1.0})}), reply_to=question)]

    return tried(home, lambda network: network.spoil(_task(), then), "this is no message of fedfuse")


@fault(FAMILY, "answers in another client's name")
def anothers_name(home: Path) -> Seen:
    """Sealed with its own key."""
    wanted = "the answer is in the name of 'client_0'"
    return _sealed(
        home, lambda network, honest: (replace(honest, client_id="client_0"), network.nodes[LAST].key), wanted
    )


@fault(FAMILY, "answers with another key")
def another_key(home: Path) -> Seen:
    """Everything else is right."""
    from fedfuse.core.sealing import SigningKey

    return _sealed(home, lambda network, honest: (honest, SigningKey.generate()), "signed by another key")


@fault(FAMILY, "sends an old run's reply")
def old_run(home: Path) -> Seen:
    """A rightly sealed answer to another question."""
    wanted = "the answer belongs to another question"
    return _sealed(
        home, lambda network, honest: (replace(honest, answer_key="0" * 40), network.nodes[LAST].key), wanted
    )


@fault(FAMILY, "sends NaN, rightly sealed")
def not_a_number(home: Path) -> Seen:
    """The seal says who, not what."""

    def change(network: Network, honest: Any) -> tuple[Any, Any]:
        from fedfuse.core.payload import Payload

        values = dict(Payload.decode(honest.upload))
        key = next(name for name, value in values.items() if getattr(value, "is_floating_point", bool)())
        values[key] = values[key] * float("nan")
        return replace(honest, upload=Payload(values).encode()), network.nodes[LAST].key

    return _sealed(home, change, "it holds NaN or infinite values")


@fault(FAMILY, "announces 10 GB")
def ten_gigabytes(home: Path) -> Seen:
    """It says that its answer is stored and has 10 GB."""

    def then(question: Any, reply: Any) -> list[Any]:
        from flwr.app import Message

        from fedfuse.runtimes.flower.codec import encode_message

        header = {"kind": "stored", "num_bytes": 10_000_000_000, "sha256": "0" * 64}
        return [Message(encode_message(header), reply_to=question)]

    return tried(home, lambda network: network.spoil(_task(), then), "10,000,000,000")


@fault(FAMILY, "sends a bomb: 5 MB that unpack to 1 GB")
def bomb(home: Path) -> Seen:
    """Compressed zeros that announce few bytes."""
    import zlib

    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()

    def then(question: Any, reply: Any) -> list[Any]:
        import json

        from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

        facts = {"protocol": 1, "codec": "zlib", "num_bytes": 1000, "header": {"kind": "answer"}}
        array = Array(dtype="uint8", shape=(len(packed),), stype="fedfuse.body", data=packed)
        content = {
            "fedfuse.header": ConfigRecord({"fedfuse.header": json.dumps(facts)}),
            "fedfuse.body": ArrayRecord({"fedfuse.body": array}),
        }
        return [Message(RecordDict(content), reply_to=question)]

    return tried(home, lambda network: network.spoil(_task(), then), "announces 1,000 bytes and holds more")


@fault(FAMILY, "hangs")
def hangs(home: Path) -> Seen:
    """It is connected and never answers."""

    def spoil(network: Network) -> None:
        def later(question: Any, reply: Any) -> list[Any]:
            network.grid.later(question)
            return []

        network.spoil(_task(), later)

    return tried(home, spoil, LAST)


@fault(FAMILY, "sends everything twice")
def twice(home: Path) -> Seen:
    """Every message of every node comes two times."""
    network = Network(home)
    network.grid.faults.append(lambda question, reply: [reply, reply])
    network.serve()
    check(digest(network.out) == undisturbed(FEDAVG, home.parent), "another digest")
    check(len(replies(network.out)) == len(network.nodes), "something counted twice")
    return Seen("each answer counts once", SAME)


@fault(FAMILY, "nodes that come and go under new numbers")
def restless(home: Path) -> Seen:
    """After every few messages a node vanishes and its client is there under another number."""
    expected = undisturbed(FUSEFL, home.parent)
    network = Network(home, FUSEFL)
    count = [0]

    def move(question: Any, reply: Any) -> Sequence[Any] | None:
        from flwr.common.constant import ErrorCode

        from flower_double import failure

        count[0] += 1
        if count[0] % 4:
            return None
        node_id = question.metadata.dst_node_id
        network.grid.apps[(1 << 61) + count[0]] = network.grid.apps.pop(node_id)
        return [failure(question, ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")]

    network.grid.faults.append(move)
    network.serve()
    check(digest(network.out) == expected, "another digest")
    return Seen(f"{count[0] // 4} nodes vanished before their answer had come, and came back as new ones", SAME)


@fault(FAMILY, "the server is killed after every single answer")
def killed_after_every_answer(home: Path) -> Seen:
    """A server that ends after each answer that it has journaled; FuseFL, 25 answers, 25 servers."""
    from fedfuse.core import journal

    class Gone(BaseException):
        pass

    expected = undisturbed(FUSEFL, home.parent)
    network, put, deaths = Network(home, FUSEFL), journal.Journal.put, 0

    def dying(self: Any, *arguments: Any, **others: Any) -> Any:
        put(self, *arguments, **others)
        raise Gone

    try:
        while True:
            journal.Journal.put = dying  # type: ignore[method-assign]
            before = replies(network.out)
            try:
                network.serve()
                break
            except Gone:
                deaths += 1
            check(len(replies(network.out)) == len(before) + 1, "not one answer more")
    finally:
        journal.Journal.put = put  # type: ignore[method-assign]
    check(digest(network.out) == expected, "another digest")
    check(deaths == len(replies(network.out)), f"{deaths} deaths")
    return Seen(f"{deaths} servers, one answer each", SAME)


@fault(FAMILY, "clocks that jump back")
def clock_back(home: Path) -> Seen:
    """All that the clients keep is from a clock that was years ahead."""
    expected = undisturbed(FUSEFL, home.parent)
    network = Network(home, FUSEFL)

    def ahead(question: Any, reply: Any) -> None:
        for path in (network.home / "clients").rglob("*"):
            if path.is_file() and path.stat().st_mtime < 4e9:
                os.utime(path, (4.1e9, 4.1e9))

    network.grid.faults.append(ahead)
    network.serve(deadline_s=60.0)
    check(digest(network.out) == expected, "another digest")
    return Seen("what was kept last is not taken for the oldest", SAME)


@fault(LOAD_FAMILY, "200 nodes at once")
def two_hundred(home: Path) -> Seen:
    """Two hundred nodes of one grid, whose answers are all there at the first look."""
    import time

    config = changed(
        FEDAVG,
        {
            "data": {
                "source": "digits",
                "validation_fraction": 0.0,
                "partition": {"scheme": "iid", "num_clients": 200},
            },
            "method.local.num_epochs": 1,
        },
    )
    expected = undisturbed(config, home.parent)
    network = Network(home, config)
    start = time.perf_counter()
    network.serve()
    seconds = time.perf_counter() - start
    check(digest(network.out) == expected, "another digest")
    check(len(replies(network.out)) == 200, "somebody is missing")
    return Seen(f"all enrolled, asked and journaled in {seconds:.1f} s, their training included", SAME)
