"""The stages of a secure sum, with clients in this process and a courier that loses what a test wants lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr")

from fedfuse.core.client import Reply, Request
from fedfuse.core.errors import ConfigError, FedfuseError, QuorumError
from fedfuse.core.fixed_point import FixedPoint, SumSettings
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, seal, unseal
from fedfuse.core.settings import to_json
from fedfuse.core.sums import SumLayout
from fedfuse.runtimes.flower.masks import (
    KeyPair,
    SecureSumError,
    Shares,
    add_mask,
    commitment,
    join_shares,
    neighbours,
    new_seed,
    pairwise_seed,
)
from fedfuse.runtimes.flower.secagg import Answer, Parcel, SecureSum
from fedfuse.runtimes.flower.secagg_client import SumClient

IDS = ["a", "b", "c", "d", "e"]
KEY = "ab" * 20
SIZE = 500
TABLE = {"model/*": "num_examples", "num_examples": ""}
LAYOUT = SumLayout.of({"model/w": torch.zeros(SIZE), "num_examples": int}, TABLE, "test")


def upload_of(client_id: str) -> Payload:
    number = IDS.index(client_id) + 1
    torch.manual_seed(number)
    return Payload({"model/w": torch.randn(SIZE), "num_examples": 10 * number})


def mean_of(ids: list[str]) -> tuple[torch.Tensor, int]:
    uploads = [upload_of(client_id) for client_id in ids]
    weights = [int(upload.number("num_examples")) for upload in uploads]
    total = sum((w * u.tensor("model/w").double() for w, u in zip(weights, uploads, strict=True)), torch.zeros(SIZE))
    return (total / sum(weights)).float(), sum(weights)


@dataclass
class Room:
    """All clients in one process. ``gone`` says in which stage which clients' answers are lost."""

    home: Path
    gone: dict[str, list[str]] = field(default_factory=dict)
    change: Callable[[str, str, bytes], bytes] = lambda stage, client_id, data: data
    answer: Callable[[str], Reply] = lambda client_id: Reply(
        client_id, upload=upload_of(client_id).encode(), answer_key=KEY, seconds=2.0, peak_rss_bytes=7
    )
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    keys: dict[str, SigningKey] = field(default_factory=lambda: {c: SigningKey.generate() for c in IDS})
    limits: list[float | None] = field(default_factory=list)

    def client(self, client_id: str) -> SumClient:
        # Made anew for every message, as where each is handled by a process of its own.
        return SumClient(client_id, self.keys[client_id], self.home / client_id)

    def carry(
        self,
        kind: str,
        parcels: Mapping[str, Parcel],
        deliver: Callable[[Answer], None],
        *,
        timeout_s: float | None,
        max_bytes: int,
    ) -> None:
        self.limits.append(timeout_s)
        for answer in self.answers(kind.partition("_")[2], parcels, max_bytes):
            deliver(answer)

    def answers(self, stage: str, parcels: Mapping[str, Parcel], max_bytes: int) -> Iterator[Answer]:
        # Replies come in any order.
        for client_id in sorted(parcels, reverse=True):
            try:
                data = self.reach(stage, client_id, parcels[client_id])
            except FedfuseError as error:
                yield Answer(client_id, error=error.what, upload_wire_bytes=1)
                continue
            if client_id in self.gone.get(stage, []):
                yield Answer(client_id, error="the node has gone")
                continue
            data = self.change(stage, client_id, data)
            assert len(data) <= max_bytes
            self.seen.append((stage, client_id, data))
            yield Answer(client_id, unseal(data, max_bytes=max_bytes), "", len(data), 5)

    def reach(self, stage: str, client_id: str, parcel: Parcel) -> bytes:
        client = self.client(client_id)
        if stage == "setup":
            return client.set_up(json.loads(json.dumps(parcel.header)), self.answer(client_id))
        handler: Callable[[Mapping[str, Any], bytes], bytes] = getattr(client, stage)
        return handler(parcel.header, parcel.body)

    def requests(self) -> list[Request]:
        facts: dict[str, Any] = {"method": "m", "settings": {}, "task": "t", "exchange": "round_0", "seed": 0}
        return [Request(**facts, client_id=c, lineage="", answer_key=KEY, payload=b"") for c in IDS]

    def sum(self, num_needed: int = 2, **changes: Any) -> Any:
        secure = SecureSum(self, LAYOUT, SumSettings(**changes))
        return secure.run(self.requests(), num_needed=num_needed, timeout_s=None)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def check_mean(upload: bytes | None, ids: list[str]) -> None:
    assert upload is not None
    found, (mean, weight) = Payload.decode(upload), mean_of(ids)
    assert found["num_examples"] == weight
    torch.testing.assert_close(found.tensor("model/w"), mean, rtol=1e-6, atol=1e-7)


def test_the_sum_is_the_weighted_mean_of_all(room: Room) -> None:
    reply = room.sum(5)
    check_mean(reply.upload, IDS)
    assert reply.missing == {}
    assert sorted(reply.contributions) == IDS
    cost = reply.contributions["c"]
    assert (cost.seconds, cost.peak_rss_bytes, cost.upload_bytes) == (2.0, 7, 8 * (SIZE + 1))
    assert cost.download_wire_bytes == 4 * 5
    # The task may take as long as it likes, the stages after it may not.
    assert room.limits == [None, 300.0, 300.0, 300.0]
    # Nothing of the attempt is left behind, only that this question was answered and over whom.
    for client_id in IDS:
        files = [path for path in (room.home / client_id / "secagg").rglob("*") if path.is_file()]
        assert [path.name for path in files] == [f"{KEY}.json"]
        assert json.loads(files[0].read_text()) == IDS


def test_small_neighbourhoods_give_the_same_sum(room: Room) -> None:
    whole = room.sum(5).upload
    assert room.sum(5, num_shares=3).upload == whole


@pytest.mark.parametrize("stage", ["setup", "share", "mask"])
@pytest.mark.parametrize("client_id", ["a", "c", "e"])
def test_one_of_five_vanishes(room: Room, stage: str, client_id: str) -> None:
    room.gone = {stage: [client_id]}
    reply = room.sum(4)
    check_mean(reply.upload, [other for other in IDS if other != client_id])
    assert reply.missing == {client_id: "the node has gone"}


def test_whoever_vanishes_after_its_numbers_came_is_in_the_sum(room: Room) -> None:
    room.gone = {"unmask": ["b"]}
    reply = room.sum(5)
    check_mean(reply.upload, IDS)
    assert reply.missing == {}


def test_one_vanishes_in_every_stage(room: Room) -> None:
    room.gone = {"setup": ["a"], "unmask": ["c"]}
    reply = room.sum(2)
    check_mean(reply.upload, ["b", "c", "d", "e"])
    room.gone = {"share": ["a"], "mask": ["b"]}
    with pytest.raises(QuorumError):
        room.sum(2)
    room.gone = {"share": ["a"], "mask": ["b"]}
    room.answer = lambda client_id: Reply(client_id, upload=upload_of(client_id).encode(), answer_key="cd" * 20)
    check_mean(room.sum(2, reconstruction_threshold=0.51).upload, ["c", "d", "e"])


@pytest.mark.parametrize(("stage", "words"), [("share", "sharing of secrets"), ("mask", "masking"), ("unmask", "end")])
def test_below_the_threshold_there_is_one_clear_error(room: Room, stage: str, words: str) -> None:
    room.gone = {stage: ["a", "b"]}
    with pytest.raises(QuorumError) as caught:
        room.sum(2)
    assert str(caught.value) == (
        f'3 of 5 clients stayed to the {words} of the secure sum "round_0", 4 are needed to take the masks away'
        " (a: the node has gone; b: the node has gone)\n"
        "  where: federation.secure_aggregation\n"
        "  fix:   run the same command again: a new sum is begun, and clients do not compute anew"
    )
    # The same command later, with everybody there.
    room.gone = {}
    check_mean(room.sum(5).upload, IDS)


def test_fewer_than_are_needed_are_not_unmasked(room: Room) -> None:
    room.gone = {"mask": ["a"]}
    reply = room.sum(5)
    assert reply.upload is None
    assert sorted(reply.contributions) == ["b", "c", "d", "e"]
    assert reply.missing == {"a": "the node has gone"}
    assert {stage for stage, _, _ in room.seen} == {"setup", "share", "mask"}
    room.gone = {"setup": ["a", "b", "c", "d"]}
    assert room.sum(1).upload is None


def test_a_number_beyond_the_range_costs_that_client_and_says_so(room: Room) -> None:
    room.home.mkdir(exist_ok=True)
    good = room.answer

    def answer(client_id: str) -> Reply:
        large = Payload({**upload_of("b"), "model/w": torch.full((SIZE,), 1e5)})
        return Reply(client_id, upload=large.encode(), answer_key=KEY) if client_id == "b" else good(client_id)

    room.answer = answer
    reply = room.sum(4)
    assert reply.missing == {"b": '"model/w" holds a number beyond the range of the sum, which ends at 16,384'}
    check_mean(reply.upload, ["a", "c", "d", "e"])


def test_a_task_that_fails_costs_that_client(room: Room) -> None:
    good = room.answer
    room.answer = lambda c: Reply(c, error="no luck", answer_key=KEY) if c == "d" else good(c)
    reply = room.sum(4)
    assert reply.missing == {"d": "no luck"}
    check_mean(reply.upload, ["a", "b", "c", "e"])


def test_the_server_never_sees_a_single_clients_numbers(room: Room) -> None:
    room.gone = {"mask": ["b"]}
    reply = room.sum(4)
    point = FixedPoint(SumSettings(), 5)
    messages = b"".join(data for _, _, data in room.seen)
    masked = {
        client_id: np.frombuffer(unseal(data, max_bytes=1 << 20).part("codes"), dtype="<u8")
        for stage, client_id, data in room.seen
        if stage == "mask"
    }
    assert sorted(masked) == ["a", "c", "d", "e"]
    for client_id in IDS:
        upload = upload_of(client_id)
        codes = LAYOUT.encode(upload, point)
        plain = upload.tensor("model/w").numpy()
        for start in range(0, SIZE - 2, 50):
            # Two numbers in a row would be found by chance once in 2^64 (float32) or 2^128 (codes) places.
            for part in (plain[start : start + 2], plain[start : start + 2].astype(float), codes[start : start + 2]):
                assert part.tobytes() not in messages
                assert part.tobytes() not in (reply.upload or b"")
        if client_id in masked:
            assert not (masked[client_id] == codes).any()
            # What is sent, and what would be left if the server took away its own guess of the numbers, is uniform.
            for found in (masked[client_id], masked[client_id] - codes):
                bits = np.unpackbits(found.view(np.uint8))
                assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5
                share = (found >> np.uint64(60)).astype(np.int64)
                assert np.bincount(share, minlength=16).max() < 4 * SIZE / 16


def test_masks_of_the_same_numbers_differ_in_every_sum(room: Room) -> None:
    room.sum(5)
    room.sum(5)
    masked = [data for stage, client_id, data in room.seen if stage == "mask" and client_id == "a"]
    first, second = (np.frombuffer(unseal(data, max_bytes=1 << 20).part("codes"), dtype="<u8") for data in masked)
    assert not (first == second).any()


def test_the_seed_alone_does_not_uncover_a_client(room: Room) -> None:
    """The own mask is taken away at the end; those with the others must still hide the numbers of each."""
    seeds: dict[str, dict[str, str]] = {}

    def watch(stage: str, client_id: str, data: bytes) -> bytes:
        if stage == "unmask":
            for owner, share in unseal(data, max_bytes=1 << 20).manifest["seeds"].items():
                seeds.setdefault(owner, {})[client_id] = share
        return data

    room.change = watch
    room.sum(5)
    codes = next(
        np.frombuffer(unseal(data, max_bytes=1 << 20).part("codes"), dtype="<u8").copy()
        for stage, client_id, data in room.seen
        if stage == "mask" and client_id == "a"
    )
    add_mask(codes, join_shares(dict(sorted(seeds["a"].items())[:4])), negative=True)
    assert not (codes == LAYOUT.encode(upload_of("a"), FixedPoint(SumSettings(), 5))).any()
    bits = np.unpackbits(codes.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5


def resealed(room: Room, who: str, data: bytes, **changes: Any) -> bytes:
    sealed = unseal(data, max_bytes=1 << 20)
    return seal({**sealed.manifest, **changes}, sealed.parts, room.keys[who])


def test_false_shares_are_noticed(room: Room) -> None:
    def lie(stage: str, client_id: str, data: bytes) -> bytes:
        if stage != "unmask" or client_id != "a":
            return data
        seeds = dict(unseal(data, max_bytes=1 << 20).manifest["seeds"])
        seeds["c"] = seeds["d"][:8] + seeds["c"][8:-2] + "00"
        return resealed(room, client_id, data, seeds=seeds)

    room.change = lie
    with pytest.raises(SecureSumError) as caught:
        room.sum(5)
    assert caught.value.what == "the shares of the secrets of client c do not fit together"


def test_false_shares_of_the_key_of_one_that_vanished_are_noticed(room: Room) -> None:
    def lie(stage: str, client_id: str, data: bytes) -> bytes:
        if stage != "unmask" or client_id != "a":
            return data
        keys = dict(unseal(data, max_bytes=1 << 20).manifest["keys"])
        keys["b"] = keys["b"][:-4] + "0000"
        return resealed(room, client_id, data, keys=keys)

    room.gone, room.change = {"mask": ["b"]}, lie
    with pytest.raises(SecureSumError, match="the shares of the secrets of client b do not fit together"):
        room.sum(4)


@pytest.mark.parametrize(
    ("stage", "changes", "reason"),
    [
        ("setup", {"attempt": "0" * 32}, "its answer belongs to something else"),
        ("setup", {"client_id": "c"}, "its answer belongs to something else"),
        ("setup", {"commitment": 3}, 'the manifest has no text "commitment"'),
        ("share", {"stage": "mask"}, "its answer belongs to something else"),
        ("share", {"tokens": {"a": "x"}}, "it did not share its secrets with all of its neighbours"),
        ("share", {"tokens": None}, "it did not share its secrets with all of its neighbours"),
        ("mask", {"kind": "answer"}, "its answer belongs to something else"),
    ],
)
def test_an_answer_that_says_something_else_costs_that_client(
    room: Room, stage: str, changes: dict[str, Any], reason: str
) -> None:
    room.change = lambda at, c, data: resealed(room, c, data, **changes) if (at, c) == (stage, "b") else data
    reply = room.sum(4)
    assert reply.missing == {"b": reason}
    check_mean(reply.upload, ["a", "c", "d", "e"])


def test_too_few_masked_numbers_cost_that_client(room: Room) -> None:
    def cut(stage: str, client_id: str, data: bytes) -> bytes:
        if (stage, client_id) != ("mask", "b"):
            return data
        sealed = unseal(data, max_bytes=1 << 20)
        return seal(sealed.manifest, {"codes": sealed.part("codes")[:-8]}, room.keys["b"])

    room.change = cut
    reply = room.sum(4)
    assert reply.missing == {"b": "it sent another count of numbers than was asked for"}
    check_mean(reply.upload, ["a", "c", "d", "e"])


def test_shares_that_cannot_be_read_cost_their_readers_and_name_their_sender(room: Room) -> None:
    def garble(stage: str, client_id: str, data: bytes) -> bytes:
        if (stage, client_id) != ("share", "b"):
            return data
        tokens = {
            other: token[:-8] + "AAAAAAA="
            for other, token in unseal(data, max_bytes=1 << 20).manifest["tokens"].items()
        }
        return resealed(room, "b", data, tokens=tokens)

    room.change = garble
    with pytest.raises(QuorumError, match="the shares of client b cannot be read"):
        room.sum(4)


def test_wrong_masks_never_pass_for_a_sum(room: Room) -> None:
    def other(stage: str, client_id: str, data: bytes) -> bytes:
        if (stage, client_id) != ("mask", "b"):
            return data
        sealed = unseal(data, max_bytes=1 << 20)
        codes = np.frombuffer(sealed.part("codes"), dtype="<u8").copy()
        add_mask(codes, bytes(32))
        return seal(sealed.manifest, {"codes": codes.tobytes()}, room.keys["b"])

    room.change = other
    with pytest.raises(SecureSumError) as caught:
        room.sum(4)
    assert str(caught.value) == (
        "the masked uploads do not add up\n  where: exchange round_0\n  fix:   ask again; a client sent something wrong"
    )


def test_a_client_gives_shares_for_one_set_of_clients_only(room: Room) -> None:
    room.sum(5)
    room.gone = {"mask": ["e"]}
    with pytest.raises(QuorumError, match="the difference of the two sums would show single clients"):
        room.sum(4)
    # The very same sum may be made again, for instance after a crash before it was written down.
    room.gone = {}
    check_mean(room.sum(5).upload, IDS)


def test_a_stage_may_be_repeated_and_nothing_else(room: Room) -> None:
    parcels: dict[str, dict[str, Parcel]] = {}
    carry = room.carry

    def keep(kind: str, given: Mapping[str, Parcel], deliver: Callable[[Answer], None], **others: Any) -> None:
        parcels[kind.partition("_")[2]] = dict(given)
        if not kind.endswith("unmask"):
            carry(kind, given, deliver, **others)

    room.carry = keep  # type: ignore[method-assign]
    with pytest.raises(QuorumError):
        room.sum(2)
    seen = {(stage, client_id): data for stage, client_id, data in room.seen}
    client = room.client("a")
    for stage in ("share", "mask"):
        again = getattr(client, stage)(parcels[stage]["a"].header, parcels[stage]["a"].body)
        assert again == seen[stage, "a"]
    header = parcels["share"]["a"].header

    def refusal(stage: str, table: Any) -> str:
        with pytest.raises(SecureSumError) as caught:
            getattr(client, stage)(header, json.dumps(table).encode())
        return caught.value.what

    keys, tokens = json.loads(parcels["share"]["a"].body), json.loads(parcels["mask"]["a"].body)
    assert refusal("share", {**keys, "b": keys["c"]}) == "the shares were given to others already"
    assert (
        refusal("mask", {k: v for k, v in tokens.items() if k != "b"}) == "the numbers were masked for others already"
    )
    assert refusal("mask", {**tokens, "z": "x"}) == "shares came from clients that are no neighbours"
    assert refusal("unmask", {"clients": ["b", "c", "d", "e"]}) == "this client is not in the sum"
    assert refusal("unmask", {"clients": ["a", "b", "c"]}) == "too few neighbours are in the sum"
    assert refusal("unmask", {"clients": 3}) == "this client is not in the sum"
    client.unmask(header, json.dumps({"clients": IDS}).encode())
    assert refusal("unmask", {"clients": IDS}) == "this client knows nothing of the sum that it is asked about"


def test_what_no_server_sends_is_refused(room: Room) -> None:
    client = room.client("a")
    header = {
        "attempt": "0" * 32,
        "layout": LAYOUT.to_json(),
        "settings": to_json(SumSettings()),
        "num_clients": 5,
    }
    client.set_up(header, room.answer("a"))

    def refusal(stage: str, body: bytes, **changes: Any) -> str:
        with pytest.raises(FedfuseError) as caught:
            getattr(client, stage)({**header, **changes}, body)
        return caught.value.what

    for attempt in ("../../x", "", None, "A" * 32):
        assert refusal("share", b"{}", attempt=attempt) == "the message belongs to no sum"
    assert refusal("share", b"{") == "the message cannot be read"
    assert refusal("share", b"[]") == "the message cannot be read"
    assert refusal("share", b"{}") == "the keys of this client are not those that it sent"
    own = json.loads((room.home / "a" / "secagg" / "attempts" / ("0" * 32) / "state.json").read_text())
    pairs = [KeyPair.of(bytes.fromhex(own[name])).public.decode() for name in ("mask_key", "lock_key")]
    assert refusal("share", json.dumps({"a": pairs}).encode()) == "there is nobody to share secrets with"
    assert refusal("share", json.dumps({"a": pairs, "b": pairs}).encode()) == "two clients have the same key"
    other = {"a": pairs, "b": ["x", "y"]}
    assert refusal("share", json.dumps(other).encode()) == "a public key cannot be read"
    assert refusal("mask", b"{}") == "shares came from clients that are no neighbours"
    assert refusal("unmask", b"{}") == "this client is not in the sum"
    for changes, what in (
        ({"num_clients": None}, "the message does not say how many clients are added up"),
        ({"settings": 1}, 'the message has no "settings"'),
        ({"layout": 1}, "this is no layout of a sum"),
        ({"settings": {"no_such": 1}}, 'unknown setting "no_such"'),
    ):
        with pytest.raises(FedfuseError) as caught:
            client.set_up({**header, **changes}, room.answer("a"))
        assert caught.value.what == what


def test_secrets_lie_where_only_the_owner_can_read_and_old_ones_go(room: Room) -> None:
    client = room.client("a")
    for number in range(6):
        header = {"attempt": f"{number:032x}", "layout": LAYOUT.to_json(), "settings": {}, "num_clients": 5}
        client.set_up(header, room.answer("a"))
    folder = room.home / "a" / "secagg"
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list((folder / "attempts").iterdir())) == 4


@settings(max_examples=50, deadline=None)
@given(num=st.integers(2, 40), num_shares=st.sampled_from([None, 3, 5, 7, 21]), attempt=st.text(max_size=5))
def test_neighbourhoods_are_mutual_and_of_one_size(num: int, num_shares: int | None, attempt: str) -> None:
    ids = [f"c{i}" for i in range(num)]
    rings = neighbours(ids, num_shares, attempt)
    size = num if num_shares is None else min(num_shares, num)
    for client_id in ids:
        assert len(set(rings[client_id])) == size
        assert client_id in rings[client_id]
        assert all(client_id in rings[other] for other in rings[client_id])


def test_a_mask_is_the_same_on_both_sides_and_cancels() -> None:
    first, second = KeyPair.generate(), KeyPair.generate()
    seed = pairwise_seed(first, second.public)
    assert len(seed) == 32
    assert seed == pairwise_seed(second, first.public)
    assert KeyPair.of(first.secret) == first
    codes = np.arange(200_000, dtype=np.uint64)
    add_mask(codes, seed)
    assert not (codes == np.arange(200_000)).any()
    add_mask(codes, seed, negative=True)
    assert (codes == np.arange(200_000)).all()


def test_the_mask_is_the_key_stream_of_aes_256_in_counter_mode() -> None:
    codes = np.zeros(2, dtype=np.uint64)
    add_mask(codes, bytes(32))
    # AES-256 of a block of zeros under a key of zeros, NIST's known answer.
    assert codes.astype("<u8").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_shares_are_read_by_their_receiver_alone() -> None:
    seed, key = new_seed(), KeyPair.generate().secret
    shares = Shares.split(seed, key, 2, ["a", "b", "c"])
    assert join_shares({name: shares[name].seed for name in ("a", "c")}) == seed
    assert join_shares({name: shares[name].key for name in ("b", "c")}) == key
    assert len(commitment(seed)) == 64
    secret = KeyPair.generate().agree(KeyPair.generate().public)
    token = shares["b"].lock(secret, sender="a", receiver="b", attempt="x")
    assert Shares.unlock(token, secret, sender="a", receiver="b", attempt="x") == shares["b"]
    for wrong in ({"sender": "c"}, {"receiver": "c"}, {"attempt": "y"}):
        facts = {"sender": "a", "receiver": "b", "attempt": "x", **wrong}
        with pytest.raises(SecureSumError, match="cannot be read"):
            Shares.unlock(token, secret, **facts)
    other = KeyPair.generate().agree(KeyPair.generate().public)
    with pytest.raises(SecureSumError, match="the shares of client a cannot be read"):
        Shares.unlock(token, other, sender="a", receiver="b", attempt="x")
    with pytest.raises(SecureSumError, match="the shares of a key do not fit together"):
        KeyPair.of(bytes(48))


def test_too_many_clients_for_the_weights_are_refused_at_once(room: Room) -> None:
    with pytest.raises(ConfigError, match="has too few bits to be right"):
        room.sum(2, max_weight=2**41)
    assert room.limits == []


def test_answers_cost_what_they_cost_over_all_stages(room: Room) -> None:
    reply = room.sum(5)
    sizes = [len(data) for _, client_id, data in room.seen if client_id == "a"]
    assert len(sizes) == 4
    assert reply.contributions["a"].upload_wire_bytes == sum(sizes)
    assert replace(reply.contributions["a"], upload_wire_bytes=0).download_wire_bytes == 20
