"""The local runtime: the same bits however many workers, and no client or worker takes the others down."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, Request, StateStore
from fedfuse.core.cohort import Cohort, Replies, Terms
from fedfuse.core.errors import ConfigError, QuorumError, TaskError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.journal import Journal
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, RUNTIMES
from fedfuse.runtimes import local
from fedfuse.runtimes.local import Local, LocalRuntime

NAME = "local_runtime_test"
IDS = [f"c{number}" for number in range(5)]
HOME = os.getpid()


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    mode: str = ""

    @client_task(uploads=("w/*", "n", "pid"), state=True)
    def work(self, client: Any, msg: Payload) -> Payload:
        in_worker = os.getpid() != HOME
        if client.id == "c1":
            if self.mode == "dies" and in_worker:
                os._exit(7)
            if self.mode == "hangs" and in_worker:
                time.sleep(30)
            if self.mode == "fails":
                raise ZeroDivisionError("no luck")
            if self.mode == "breaks":
                return Payload({"secret": 1})
        if self.mode == "slow":
            time.sleep(0.06)
        client.progress(1, 4)
        client.state["count"] = int(client.state.get("count", 0)) + 1
        x = client.data.train.x
        matrix = torch.rand(64, 64, generator=client.rng.torch("m")) + x.mean()
        product = matrix @ matrix + torch.rand(64, 64) + msg.tensor("w/x")
        return Payload({"n": client.state["count"], "w/x": product, "w/half": product.bfloat16()})

    @client_task(uploads=("pid", "parent"), settings=())
    def place(self, client: Any, msg: Payload) -> Payload:
        return Payload({"pid": os.getpid(), "parent": os.getppid()})


@pytest.fixture(autouse=True)
def _toy_is_registered() -> Iterator[None]:
    register_method(NAME)(Toy)
    yield
    del METHODS._entries[NAME], METHODS._facts[NAME]


@pytest.fixture
def _workers_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_WORTH_IT_S", -1.0)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def sides(folder: Path | None = None, ids: list[str] | None = None) -> dict[str, ClientSide]:
    # States in files: with states in memory there are no workers.
    states = StateStore(folder or Path(tempfile.mkdtemp(prefix="fedfuse-test-")))
    spec, found = ModelSpec({"kind": "none"}, 0, (2,), 2), {}
    for number, client_id in enumerate(ids or IDS):
        examples = Examples(torch.full((3 + number, 2), float(number)), torch.zeros(3 + number, dtype=torch.int64))
        found[client_id] = ClientSide(client_id, ClientData(examples, examples, 2), spec, states=states)
    return found


class Federation:
    """A local runtime and a cohort over it."""

    def __init__(self, workers: int | None, mode: str = "", folder: Path | None = None, **changes: Any) -> None:
        self.runtime = LocalRuntime(sides(folder), workers=workers)
        self.method = Toy(mode=mode)
        spec = ModelSpec({"kind": "none"}, 0, (2,), 2)
        self.cohort = Cohort(
            runtime=self.runtime, method=self.method, model_of=lambda client_id: spec, seed=1, **changes
        )

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.close()

    def ask(self, key: str = "one", **more: Any) -> Replies:
        return self.cohort.ask(Toy.work, Payload({"w/x": torch.ones(64, 64)}), key=key, **more)

    def places(self, key: str) -> list[float]:
        return list(self.cohort.ask(Toy.place, key=key).numbers("pid").values())


def bits(replies: Mapping[str, Payload]) -> dict[str, str]:
    return {client_id: payload.digest() for client_id, payload in replies.items()}


# --- the same bits


@pytest.mark.usefixtures("_workers_from_the_start")
def test_workers_change_no_bit(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, str]]] = {}
    ledgers = []
    for name, workers, timeout_s in (("alone", 1, None), ("one", 1, 30.0), ("two", 2, None), ("two_limited", 2, 30.0)):
        with Federation(workers, folder=tmp_path / name, terms=Terms(timeout_s=timeout_s)) as federation:
            found[name] = [bits(federation.ask(key)) for key in ("one", "two")]
            uses_workers = name != "alone"
            assert all((pid != os.getpid()) is uses_workers for pid in federation.places("places"))
            entries = federation.cohort.ledger.to_json()["entries"]
            ledgers.append([(e["exchange"], e["client"], e["upload_bytes"], e["download_bytes"]) for e in entries[:10]])
    assert all(each == found["alone"] for each in found.values())
    assert all(each == ledgers[0] for each in ledgers)
    assert list(found["alone"][0]) == IDS
    assert len(set(found["alone"][0].values())) == len(IDS)


def test_short_work_stays_in_this_process() -> None:
    with Federation(2) as federation:
        assert set(federation.places("one")) == {os.getpid()}
        assert federation.runtime._workers == []


def test_long_work_goes_to_workers_once_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_WORTH_IT_S", 0.05)
    with Federation(2, "slow") as federation:
        federation.ask()
        assert len(federation.runtime._workers) == 2
        assert federation.runtime._seconds_by_task.keys() == {"work"}


def test_the_largest_client_goes_first() -> None:
    runtime = LocalRuntime(sides(), workers=1)
    requests = [Request(NAME, {}, "place", "one", each, 0, "", "key", Payload().encode()) for each in IDS]
    replies = runtime.exchange(requests, timeout_s=None, progress=lambda *facts: None)
    assert [reply.client_id for reply in replies] == IDS[::-1]


@pytest.mark.usefixtures("_workers_from_the_start")
def test_progress_of_a_worker_is_told() -> None:
    told: list[tuple[Any, ...]] = []
    with Federation(2, progress=lambda *facts: told.append(facts)) as federation:
        federation.ask()
    assert {(fact[1], fact[4]) for fact in told} >= {(client_id, 0.25) for client_id in IDS[:2]}
    assert told[-1][2:] == (5, 5, 1.0)


# --- clients that fail


@pytest.mark.usefixtures("_workers_from_the_start")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_costs_only_its_client(workers: int) -> None:
    with Federation(workers, "dies", terms=Terms(quorum=0.5, timeout_s=30)) as federation:
        replies = federation.ask()
        assert replies.missing == {"c1": "its worker process died (exit code 7)"}
        assert list(replies) == ["c0", "c2", "c3", "c4"]
        # The runtime is as good as new.
        assert len(federation.places("two")) == 5


@pytest.mark.usefixtures("_workers_from_the_start")
def test_a_worker_that_is_killed_while_it_waits_is_replaced() -> None:
    with Federation(2) as federation:
        federation.ask()
        for worker in federation.runtime._workers:
            worker.process.kill()
            worker.process.join()
        assert len(federation.places("two")) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_takes_too_long_is_left_behind(workers: int) -> None:
    start = time.monotonic()
    with Federation(workers, "hangs", terms=Terms(quorum=0.5, timeout_s=0.4)) as federation:
        replies = federation.ask()
        assert replies.missing == {"c1": "no reply within 0.4 s"}
        assert list(replies) == ["c0", "c2", "c3", "c4"]
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_a_task_that_fails_is_named_with_its_place(timeout_s: float | None) -> None:
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if 'Error("no luck")' in text)
    with Federation(2, "fails", terms=Terms(timeout_s=timeout_s)) as federation:
        with pytest.raises(QuorumError) as caught:
            federation.ask()
    assert caught.value.what == (
        '4 of 5 clients answered the exchange "one", 5 are needed '
        f"(c1: ZeroDivisionError: no luck (test_local_runtime.py:{line}))"
    )


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_a_task_that_breaks_the_contract_stops_the_run_and_its_workers(timeout_s: float | None) -> None:
    with Federation(2, "breaks", terms=Terms(timeout_s=timeout_s, quorum=0.01)) as federation:
        with pytest.raises(TaskError) as caught:
            federation.ask()
        assert str(caught.value) == (
            'the task "work" uploads "secret" that it did not declare\n'
            f"  where: {NAME}\n"
            "  fix:   add it to @client_task(uploads=...) or do not send it"
        )
        del caught
        assert len(federation.places("two")) == 5


# --- what is left behind


@pytest.mark.usefixtures("_workers_from_the_start")
def test_closing_stops_the_workers_and_may_be_repeated() -> None:
    federation = Federation(2)
    federation.ask()
    pids = {worker.process.pid for worker in federation.runtime._workers}
    assert len(pids) == 2
    assert {child.pid for child in multiprocessing.active_children()} == pids
    federation.runtime.close()
    federation.runtime.close()
    assert multiprocessing.active_children() == []
    assert not any(is_alive(pid) for pid in pids if pid)
    federation.cohort.ask(Toy.place, key="two")
    federation.runtime.close()


@pytest.mark.usefixtures("_workers_from_the_start")
def test_an_exchange_that_is_abandoned_leaves_no_worker() -> None:
    with Federation(2, "slow") as federation:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        federation.cohort._progress = interrupt
        with pytest.raises(KeyboardInterrupt):
            federation.ask()
        assert multiprocessing.active_children() == []


def is_alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_parent_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            sys.path.insert(0, sys.argv[1])
            import test_local_runtime as t
            t.register_method(t.NAME)(t.Toy)
            def perform(request, side, tell):
                os.write(1, f"{os.getpid()}\\n".encode())
                time.sleep(60)
            t.local.perform = perform
            t.Federation(2, terms=t.Terms(timeout_s=100.0)).ask()
            """
        )
    )
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(is_alive(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_a_run_that_was_stopped_by_a_failing_client_continues_where_it_was(tmp_path: Path) -> None:
    folders = {"folder": tmp_path / "states"}
    with Journal(tmp_path / "j") as journal:
        with Federation(1, "fails", journal=journal, **folders) as federation:
            with pytest.raises(QuorumError):
                federation.ask()
            assert len(journal.entries()) == 4
        with Federation(2, "fails", journal=journal, terms=Terms(quorum=0.8), **folders) as federation:
            assert list(federation.ask()) == ["c0", "c2", "c3", "c4"]
            assert [entry.from_journal for entry in federation.cohort.ledger.entries] == [True] * 4 + [False]


# --- settings


def test_settings_that_cannot_be() -> None:
    for name in ("workers", "client_threads"):
        with pytest.raises(ConfigError) as caught:
            Local(**{name: 0})
        assert str(caught.value) == f"{name} is 0\n  where: runtime.{name}\n  fix:   give at least 1"


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Local().client_device() == Local(device="cpu").client_device() == torch.device("cpu")
    with pytest.raises(ConfigError) as caught:
        Local(device="cuda").client_device()
    assert str(caught.value) == ("there is no CUDA device\n  where: runtime.device\n  fix:   use device: cpu or auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Local().client_device() == Local(device="cuda").client_device() == torch.device("cuda")
    assert Local(device="cpu").client_device() == torch.device("cpu")


def test_what_is_known_of_the_clients() -> None:
    runtime = Local(workers=3).open(dict(reversed(sides().items())))
    assert list(runtime.clients()) == IDS
    facts = runtime.clients()["c0"]
    assert (facts.fingerprint, facts.num_threads, facts.device) == (sides()["c0"].data.fingerprint, 1, "cpu")
    assert RUNTIMES.get("local") is Local


def test_no_more_workers_than_clients() -> None:
    assert LocalRuntime(sides(ids=["a", "b"]), workers=8)._num_workers == 2


def test_states_in_memory_are_never_given_to_workers() -> None:
    found = sides()
    for client_id, side in found.items():
        found[client_id] = dataclasses.replace(side, states=StateStore())
    runtime = LocalRuntime(found, workers=2)
    assert runtime._num_workers == 1
