"""Whole runs over Flower's transport whose server sees sums only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.common.constant import ErrorCode

import fedfuse
from fedfuse.core.client import ClientSide, Request, perform
from fedfuse.core.errors import ConfigError, QuorumError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.fixed_point import FixedPoint, SumSettings
from fedfuse.core.journal import Journal
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, unseal
from fedfuse.core.sums import SumLayout
from fedfuse.experiment import Result
from fedfuse.methods.tasks import MODEL_SUMS
from fedfuse.runtimes.flower import node as node_module
from fedfuse.runtimes.flower.codec import decode_message
from fedfuse.runtimes.flower.post import Post
from flower_double import DoubleGrid, DoubleRuntime, FlowerDouble, failure

IDS = [f"client_{number}" for number in range(5)]
CONFIG: dict[str, Any] = {
    "seed": 3,
    "data": {
        "source": "digits",
        "limit": 400,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "cnn", "width": 2, "depth": 2, "norm": "batch"},
    "runtime": {"name": "flower-double"},
    "server": {"threads": 1},
}
LOCAL = {"num_epochs": 1, "batch_size": 32}
METHODS = {
    "fedavg": {"local": LOCAL},
    "fedprox": {"local": LOCAL},
    "fedadam": {"local": LOCAL, "num_rounds": 1},
    "afl": {"backbone": {"num_features": 32}},
    "prototypes": {"backbone": {"num_features": 32}},
}


@dataclass
class Watched:
    """The runtimes of a test, and what goes wrong in them."""

    home: Path
    gone: dict[str, list[str]] = field(default_factory=dict)
    node: dict[str, Any] = field(default_factory=dict)
    runtimes: list[DoubleRuntime] = field(default_factory=list)
    sides: dict[str, ClientSide] = field(default_factory=dict)
    performed: list[Request] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    @property
    def grid(self) -> DoubleGrid:
        return self.runtimes[-1].grid

    def stages(self) -> list[tuple[str, str]]:
        return [(m.metadata.message_type, self.name_of(m.metadata.dst_node_id)) for m in self.grid.sent]

    def name_of(self, node_id: int) -> str:
        return IDS[node_id - (1 << 62)]

    def fault(self, question: Message, reply: Message) -> Sequence[Message] | None:
        stage = question.metadata.message_type.rpartition("secagg_")[2]
        node_id = question.metadata.dst_node_id
        if self.name_of(node_id) not in self.gone.get(stage, []):
            return None
        self.grid.apps.pop(node_id, None)
        return [failure(question, ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Watched:
    found, begin = Watched(tmp_path / "nodes"), FlowerDouble.open

    def open_watched(settings: FlowerDouble, sides: dict[str, ClientSide]) -> DoubleRuntime:
        runtime = begin(settings, sides)
        runtime.grid.faults.append(found.fault)
        for node in runtime.nodes:
            # The clients' machines outlive the server's process.
            home = found.home / node.name
            for name, value in {"home": home, "key": SigningKey.load_or_make(home / "key.pem"), **found.node}.items():
                object.__setattr__(node, name, value)
        found.runtimes.append(runtime)
        found.sides = dict(sides)
        return runtime

    def perform_watched(request: Request, side: ClientSide, progress: Any) -> Any:
        found.performed.append(request)
        reply = perform(request, side, progress)
        found.uploads[request.client_id] = reply.upload or b""
        return reply

    monkeypatch.setattr(FlowerDouble, "open", open_watched)
    monkeypatch.setattr(node_module, "perform", perform_watched)
    return found


def run(name: str, folder: Path | None = None, secure: Any = None, **federation: Any) -> Result:
    config = {**CONFIG, "method": {"name": name, **METHODS.get(name, {})}}
    return fedfuse.run({**config, "federation": {**federation, "secure_aggregation": secure}}, out=folder)


def state_of(result: Result) -> dict[str, torch.Tensor]:
    assert result.artifact is not None
    return dict(result.artifact.state)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_result_is_that_of_single_uploads(name: str, watched: Watched) -> None:
    secure, plain = run(name, secure={}), run(name)
    kinds = {kind.partition(".")[2] for kind, _ in watched.stages()}
    assert kinds == {"enrol", "task"}
    first = {m.metadata.message_type.partition(".")[2] for m in watched.runtimes[0].grid.sent}
    assert first == {"enrol", "secagg_setup", "secagg_share", "secagg_mask", "secagg_unmask"}
    have, want = state_of(secure), state_of(plain)
    assert list(have) == list(want)
    for key, tensor in want.items():
        assert have[key].dtype == tensor.dtype
        # Heads come out of a matrix inversion, which widens the rounding of the sums a little.
        torch.testing.assert_close(have[key], tensor, rtol=1e-5, atol=1e-6)
    assert secure.accuracy == plain.accuracy
    assert secure.missing == {}
    (uploads,) = secure.facts["uploads"].values()
    assert list(uploads) == ["sum"]
    assert secure.ledger["download_bytes_total"] == plain.ledger["download_bytes_total"]
    assert secure.ledger["upload_wire_bytes_total"] > secure.ledger["upload_bytes_total"] > 0


def test_the_mean_of_fedavg_is_within_the_bound(watched: Watched, tmp_path: Path) -> None:
    run("fedavg", tmp_path / "run", secure={})
    with Journal(tmp_path / "run" / "journal") as journal:
        (entry,) = journal.entries()
        total = entry.payload()
    uploads = [Payload.decode(data) for _, data in sorted(watched.uploads.items())]
    weights = [int(upload.number("num_examples")) for upload in uploads]
    assert total["num_examples"] == sum(weights)
    assert total.tensor("label_counts").tolist() == sum(u.tensor("label_counts") for u in uploads).tolist()  # type: ignore[union-attr]
    bound = FixedPoint(SumSettings(), 5).error_of_mean(sum(weights))
    assert bound < 1e-9
    assert not any(key.startswith("curve/") for key in total)
    for key, tensor in total.group("model").items():
        true = sum(w * u.tensor(f"model/{key}").double() for w, u in zip(weights, uploads, strict=True)) / sum(weights)
        assert isinstance(true, torch.Tensor)
        rounded = true.abs() * 2.0**-23 if tensor.is_floating_point() else torch.tensor(0.5)
        assert bool(((tensor.double() - true).abs() <= bound + rounded).all()), key


def test_the_sums_of_afl_are_within_the_bound(watched: Watched, tmp_path: Path) -> None:
    run("afl", tmp_path / "run", secure={})
    with Journal(tmp_path / "run" / "journal") as journal:
        (entry,) = journal.entries()
        total = entry.payload()
    bound = FixedPoint(SumSettings(), 5).error_of_sum
    for key in ("sums/gram", "sums/targets"):
        true = sum(Payload.decode(data).tensor(key) for data in watched.uploads.values())
        assert isinstance(true, torch.Tensor)
        assert float((total.tensor(key) - true).abs().max()) <= bound + 1e-15 * float(true.abs().max())


def secrets_of(watched: Watched) -> dict[str, list[bytes]]:
    """Byte strings that would give a client's numbers away: as floats, as doubles, and as the integers behind masks."""
    model = Payload.decode(watched.uploads[IDS[0]]).group("model")
    expect = {f"model/{key}": value for key, value in model.items()}
    layout = SumLayout.of(
        {**expect, "num_examples": int, "label_counts": TensorSpec((10,), torch.int64)}, MODEL_SUMS, "test"
    )
    found = {}
    for client_id, data in watched.uploads.items():
        upload = Payload.decode(data)
        codes = layout.encode(upload, FixedPoint(SumSettings(), 5))
        floats = np.concatenate(
            [t.numpy().reshape(-1) for t in upload.group("model").values() if t.dtype.is_floating_point]
        )
        # Weights only: what a client has not trained, others have too.
        weights = [floats[i : i + 3] for i in range(0, len(floats) - 3, 3) if len(set(floats[i : i + 3])) == 3]
        numbers = [codes[i : i + 2] for i in range(0, len(codes) - 2, 2) if len(set(codes[i : i + 2])) == 2]
        found[client_id] = [part.tobytes() for part in weights]
        found[client_id] += [part.astype(np.float64).tobytes() for part in weights]
        found[client_id] += [part.tobytes() for part in numbers if part.max() > 2**20]
        assert len(found[client_id]) > 80
    return found


def test_the_server_stores_and_sees_the_sum_alone(watched: Watched, tmp_path: Path) -> None:
    run("fedavg", tmp_path / "run", secure={})
    secrets = secrets_of(watched)
    messages = b"".join(
        array.data
        for m in watched.grid.seen
        for record in m.content.array_records.values()
        for array in record.values()
    )
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len([path for path in files if path.parent.name == "journal" and path.suffix == ".safetensors"]) == 1
    for client_id, parts in secrets.items():
        for part in parts:
            assert part not in messages, client_id
            for path, data in files.items():
                assert part not in data, (client_id, path)
    # The search does find what is there: in a run without secure aggregation.
    run("fedavg", tmp_path / "plain")
    stored = b"".join(path.read_bytes() for path in (tmp_path / "plain" / "journal").glob("*.safetensors"))
    assert all(parts[0] in stored for parts in secrets.values())


def test_masked_numbers_look_uniform(watched: Watched) -> None:
    run("fedavg", secure={})
    masked = []
    for message in watched.grid.seen:
        header, body = decode_message(message.content, max_bytes=1 << 26)
        if header["kind"] == "sum" and (sealed := unseal(body, max_bytes=1 << 26)).manifest["stage"] == "mask":
            masked.append(np.frombuffer(sealed.part("codes"), dtype="<u8"))
    assert len(masked) == 5
    for codes in masked:
        bits = np.unpackbits(codes.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5
    assert len(np.unique(np.concatenate(masked))) == sum(len(codes) for codes in masked)


@pytest.mark.parametrize("stage", ["share", "mask", "unmask"])
def test_one_of_five_vanishes(stage: str, watched: Watched, tmp_path: Path) -> None:
    watched.gone = {stage: [IDS[3]]}
    result = run("fedavg", tmp_path / "run", secure={"stage_timeout_s": 0.3}, quorum=0.8)
    there = [client_id for client_id in IDS if client_id != IDS[3] or stage == "unmask"]
    assert sorted(result.missing) == sorted(set(IDS) - set(there))
    if stage != "unmask":
        assert result.missing[IDS[3]] == ("local_models: no answer within 0.3 s; it was not connected at the end")
    with Journal(tmp_path / "run" / "journal") as journal:
        (entry,) = journal.entries()
    assert sorted(entry.facts["contributions"]) == there
    weights = {c: int(Payload.decode(watched.uploads[c]).number("num_examples")) for c in there}
    assert entry.payload()["num_examples"] == sum(weights.values())
    key = next(key for key in entry.payload() if key.endswith(".weight"))
    true = sum(w * Payload.decode(watched.uploads[c]).tensor(key).double() for c, w in weights.items())
    assert isinstance(true, torch.Tensor)
    torch.testing.assert_close(entry.payload().tensor(key).double(), true / sum(weights.values()), rtol=1e-6, atol=1e-7)


def test_below_the_threshold_the_run_stops_and_goes_on_without_new_work(watched: Watched, tmp_path: Path) -> None:
    watched.gone = {"mask": IDS[:2]}
    with pytest.raises(QuorumError) as caught:
        run("fedavg", tmp_path / "run", secure={"stage_timeout_s": 0.3}, quorum=0.4)
    assert caught.value.what.startswith(
        '3 of 5 clients stayed to the masking of the secure sum "local_models", 4 are needed to take the masks away'
    )
    watched.gone = {}
    assert run("fedavg", tmp_path / "run", secure={"stage_timeout_s": 0.3}, quorum=0.4).missing == {}
    # Nobody worked twice, and a finished sum is not asked again.
    before = len(watched.performed)
    assert before == 5
    again = run("fedavg", tmp_path / "run", secure={"stage_timeout_s": 0.3}, quorum=0.4)
    assert len(watched.performed) == before
    assert {kind.partition(".")[2] for kind, _ in watched.stages()} == {"enrol"}
    assert again.accuracy is not None


class Dies(Exception):
    """The server's process ends."""


def test_after_a_crash_the_stages_start_anew_and_clients_do_not_work_twice(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = Post.received

    def dying(self: Post) -> Any:
        for message_id, letter, message in received(self):
            if letter.kind.endswith("secagg_unmask"):
                raise Dies
            yield message_id, letter, message

    monkeypatch.setattr(Post, "received", dying)
    with pytest.raises(Dies):
        run("fedavg", tmp_path / "run", secure={})
    monkeypatch.setattr(Post, "received", received)
    assert not list((tmp_path / "run" / "journal").glob("*.json"))
    result = run("fedavg", tmp_path / "run", secure={})
    assert result.missing == {}
    assert sorted(request.client_id for request in watched.performed) == IDS


def test_an_owner_may_let_masked_uploads_go_only(watched: Watched) -> None:
    watched.node = {"only_sums": True}
    assert run("fedavg", secure={}).missing == {}
    # Nor does the server hear how many examples each of them has.
    assert {facts.num_examples for facts in watched.runtimes[-1].clients().values()} == {None}
    with pytest.raises(QuorumError, match="its owner lets uploads go only where they are added up unseen"):
        run("fedavg")


def test_an_owner_who_refuses_is_missing_and_leave_to_go_masked_is_no_leave_to_go_plain(watched: Watched) -> None:
    asked = []

    def approve(request: Request, upload: bytes) -> str:
        asked.append(request.client_id)
        return "not today" if request.client_id == IDS[0] else ""

    watched.node = {"approve": approve}
    result = run("fedavg", secure={}, quorum=0.8)
    assert result.missing == {
        IDS[0]: "local_models: its owner did not let the upload go\n  where: client client_0\n  fix:   not today"
    }
    assert sorted(asked) == IDS
    assert list(watched.home.rglob("*.fed"))
    assert not list(watched.home.rglob("*.approved"))


@pytest.mark.parametrize(
    ("name", "settings"), [("ensemble", {"local": LOCAL}), ("fednova", {"local": LOCAL, "num_rounds": 1}), ("lda", {})]
)
def test_a_method_that_needs_single_uploads_is_refused(name: str, settings: dict[str, Any], watched: Watched) -> None:
    config = {**CONFIG, "method": {"name": name, **settings}, "federation": {"secure_aggregation": {}}}
    with pytest.raises(ConfigError) as caught:
        fedfuse.run(config)
    assert str(caught.value) == (
        f'the method "{name}" needs to see single uploads\n'
        "  where: federation.secure_aggregation\n"
        "  fix:   leave this section out, or use one of: afl, fedadam, fedavg, fedit, fedprox, ffa_lora, prototypes"
    )
    assert watched.performed == []


def test_settings_under_which_uploads_do_not_add_up_are_refused(watched: Watched) -> None:
    config = {**CONFIG, "method": {"name": "prototypes", "kind": "naive_bayes"}}
    with pytest.raises(ConfigError) as caught:
        fedfuse.run({**config, "federation": {"secure_aggregation": {}}})
    assert str(caught.value) == (
        '"prototypes/squares" cannot be added up over clients without being seen\n'
        "  where: prototypes, exchange prototypes\n"
        "  fix:   use other settings of the method, or leave federation.secure_aggregation out"
    )


def test_other_runtimes_and_wrong_settings_say_so() -> None:
    config = {**CONFIG, "method": {"name": "fedavg", "local": LOCAL}, "runtime": {"name": "local", "workers": 1}}
    with pytest.raises(ConfigError, match="this runtime sees every upload"):
        fedfuse.run({**config, "federation": {"secure_aggregation": {}}})
    with pytest.raises(ConfigError) as caught:
        fedfuse.run({**config, "federation": {"secure_aggregation": {"clipping": 8}}})
    assert str(caught.value) == (
        'unknown setting "clipping"\n'
        "  where: federation.secure_aggregation.clipping\n"
        '  fix:   did you mean "clipping_range"? known: clipping_range, max_weight, num_shares, '
        "reconstruction_threshold, stage_timeout_s"
    )
