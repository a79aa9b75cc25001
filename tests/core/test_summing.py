"""``cohort.ask`` where the server may see sums only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, Reply, Request, perform
from fedfuse.core.cohort import ClientFacts, Cohort, Terms
from fedfuse.core.errors import ConfigError, QuorumError, UploadRefused
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.fixed_point import FixedPoint, SumSettings
from fedfuse.core.guarantee import Releases
from fedfuse.core.journal import Journal
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS
from fedfuse.core.release import Privacy
from fedfuse.core.summing import methods_that_need_only_sums
from fedfuse.core.sums import Contribution, SumLayout, SumReply

NAME = "summing_test"
IDS = ["a", "b", "c"]
SPEC = ModelSpec({"kind": "none"}, 0, (2,), 2)
EXPECT = {"w": TensorSpec((2,)), "n": int}


@dataclass(frozen=True, kw_only=True)
class Summed(Method):
    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"mean": {"w": "n", "n": ""}}

    @client_task(uploads=("w", "n", "curve/*"), settings=())
    def mean(self, client: Any, msg: Payload) -> Payload:
        x = client.data.train.x
        return Payload({"w": x.mean(0), "n": len(x), "curve/x": x[:, 0]})

    @client_task(uploads=("w", "n"), settings=())
    def other(self, client: Any, msg: Payload) -> Payload:
        return self.mean(client, msg)


@dataclass(frozen=True, kw_only=True)
class Heir(Summed):
    """Its server may look at more, so what its base declares is not its own."""


@pytest.fixture(autouse=True)
def _toys_are_registered() -> Iterator[None]:
    for name, cls in ((NAME, Summed), (NAME + "_heir", Heir)):
        register_method(name)(cls)
    yield
    for name in (NAME, NAME + "_heir"):
        del METHODS._entries[name], METHODS._facts[name]


def sides() -> dict[str, ClientSide]:
    found = {}
    for number, client_id in enumerate(IDS):
        examples = Examples(torch.full((number + 1, 2), float(number)), torch.zeros(number + 1, dtype=torch.int64))
        found[client_id] = ClientSide(client_id, ClientData(examples, examples, 2), SPEC)
    return found


@dataclass
class Adds:
    """A runtime that adds up in the open; what it leaves out and gives back, a test may decide."""

    gone: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[SumReply], SumReply] = lambda reply: reply
    num_sums: int = 0
    needed: list[int] = field(default_factory=list)

    def clients(self) -> Mapping[str, ClientFacts]:
        return {client_id: ClientFacts(side.data.fingerprint) for client_id, side in sides().items()}

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        raise AssertionError("nobody may be asked to show an upload")

    def exchange_sum(
        self,
        requests: Sequence[Request],
        layout: SumLayout,
        settings: SumSettings,
        *,
        num_needed: int,
        timeout_s: float | None,
        progress: Callable[[str, int, int], None],
    ) -> SumReply:
        self.num_sums += 1
        self.needed.append(num_needed)
        point = FixedPoint(settings, len(requests))
        total, there = None, [r for r in requests if r.client_id not in self.gone]
        for request in there:
            upload = perform(request, sides()[request.client_id]).upload
            assert upload is not None
            codes = layout.encode(Payload.decode(upload), point)
            total = codes if total is None else total + codes
            progress(request.client_id, 4, 4)
        costs = {r.client_id: Contribution(seconds=1.0, upload_bytes=24, upload_wire_bytes=100) for r in there}
        enough = total is not None and len(there) >= num_needed
        data = layout.decode(total, point).encode() if total is not None and enough else None
        return self.change(SumReply(data, costs, self.gone))

    def close(self) -> None:
        pass


SECURE = Terms(secure_aggregation=SumSettings())


def cohort(runtime: Any, method: Method | None = None, **changes: Any) -> Cohort:
    arguments: dict[str, Any] = {"terms": SECURE, "seed": 1, **changes}
    return Cohort(runtime=runtime, method=method or Summed(), model_of=lambda client_id: SPEC, **arguments)


def test_the_method_gets_one_reply_that_is_the_mean_of_all() -> None:
    group = cohort(Adds())
    replies = group.ask(group._method.mean, key="one", expect=EXPECT)  # type: ignore[attr-defined]
    assert list(replies) == ["sum"]
    assert replies["sum"]["n"] == 6
    # One example of 0, two of 1, three of 2.
    torch.testing.assert_close(replies["sum"].tensor("w"), torch.full((2,), 8 / 6))
    assert "curve/x" not in replies["sum"]
    assert replies.missing == {}
    rows = [(entry.client, entry.upload_bytes, entry.upload_wire_bytes) for entry in group.ledger.entries]
    assert rows == [("a", 24, 100), ("b", 24, 100), ("c", 24, 100)]
    assert list(group.uploads["one"]) == ["sum"]


def test_a_sum_is_in_the_journal_and_is_not_asked_again(tmp_path: Path) -> None:
    runtime = Adds(gone={"b": "it is away"})
    terms = Terms(quorum=0.5, secure_aggregation=SumSettings())
    seen = []
    for _ in range(2):
        with Journal(tmp_path / "journal") as journal:
            group = cohort(runtime, journal=journal, terms=terms)
            replies = group.ask(Summed().mean, key="one", expect=EXPECT)
            seen.append((replies["sum"].encode(), dict(replies.missing), dict(group.missing), len(journal.entries())))
            assert [entry.client for entry in group.ledger.entries] == ["a", "c"]
    assert runtime.num_sums == 1
    assert runtime.needed == [2]
    assert seen[0] == seen[1]
    assert seen[0][1:] == ({"b": "it is away"}, {"b": "one: it is away"}, 1)


def test_another_range_is_another_question(tmp_path: Path) -> None:
    runtime = Adds()
    for clipping_range in (10.0, 10.0, 20.0):
        with Journal(tmp_path / "journal") as journal:
            terms = Terms(secure_aggregation=SumSettings(clipping_range=clipping_range))
            cohort(runtime, journal=journal, terms=terms).ask(Summed().mean, key="one", expect=EXPECT)
    assert runtime.num_sums == 2


def test_below_the_quorum_there_is_no_sum_and_the_same_command_continues() -> None:
    with pytest.raises(QuorumError) as caught:
        cohort(Adds(gone={"b": "it is away"})).ask(Summed().mean, key="one", expect=EXPECT)
    assert str(caught.value) == (
        '2 of 3 clients answered the exchange "one", 3 are needed (b: it is away)\n'
        "  where: memory\n"
        "  fix:   mend the clients and run the same command again (what came is kept), or lower federation.quorum"
    )


def test_the_sum_of_a_single_client_would_be_its_own_upload() -> None:
    terms = Terms(quorum=0.1, secure_aggregation=SumSettings())
    runtime = Adds(gone={"b": "away", "c": "away"})
    with pytest.raises(QuorumError, match='1 of 3 clients answered the exchange "one", 2 are needed'):
        cohort(runtime, terms=terms).ask(Summed().mean, key="one", expect=EXPECT)


def test_a_total_that_does_not_fit_is_refused() -> None:
    wrong = Payload({"w": torch.zeros(3), "n": 1}).encode()
    runtime = Adds(change=lambda reply: SumReply(wrong, reply.contributions, {}))
    with pytest.raises(UploadRefused, match="its shape is \\(3,\\), wanted \\(2,\\)"):
        cohort(runtime).ask(Summed().mean, key="one", expect=EXPECT)


def test_a_method_that_looks_at_single_uploads_is_refused_before_anybody_is_asked() -> None:
    with pytest.raises(ConfigError) as caught:
        cohort(Adds(), Heir())
    assert str(caught.value) == (
        f'the method "{NAME}_heir" needs to see single uploads\n'
        "  where: federation.secure_aggregation\n"
        "  fix:   leave this section out, or use one of: "
        f"afl, fedadam, fedavg, fedit, fedprox, ffa_lora, prototypes, {NAME}"
    )
    assert methods_that_need_only_sums() == [
        "afl",
        "fedadam",
        "fedavg",
        "fedit",
        "fedprox",
        "ffa_lora",
        "prototypes",
        NAME,
    ]


def test_a_task_that_is_not_declared_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        cohort(Adds()).ask(Summed().other, key="one", expect=EXPECT)
    assert caught.value.what == ('the answers to the task "other" cannot be added up over clients without being seen')
    assert caught.value.where == f"{NAME}, exchange one"
    with pytest.raises(ConfigError, match="the clients' uploads do not look alike"):
        cohort(Adds()).ask(Summed().mean, key="one", expect=lambda c: {**EXPECT, "w": TensorSpec((ord(c),))})


def test_a_runtime_that_sees_uploads_is_refused() -> None:
    class Sees:
        def clients(self) -> Mapping[str, ClientFacts]:
            return Adds().clients()

    with pytest.raises(ConfigError) as caught:
        cohort(Sees()).ask(Summed().mean, key="one", expect=EXPECT)
    assert str(caught.value) == (
        "this runtime sees every upload, so it cannot add them up unseen\n"
        "  where: federation.secure_aggregation\n"
        "  fix:   run the federation on Flower (fedfuse serve), or leave this section out"
    )


def test_privacy_that_needs_single_uploads_is_refused() -> None:
    privacy = Privacy(mechanism="central", clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ConfigError) as caught:
        cohort(Adds(), releases=Releases(privacy))
    assert str(caught.value) == (
        "the privacy mechanism central needs to see single uploads\n"
        "  where: privacy.mechanism\n"
        "  fix:   use mechanism: local, or leave federation.secure_aggregation out"
    )
