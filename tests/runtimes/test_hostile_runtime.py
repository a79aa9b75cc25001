"""A runtime some of whose clients forge what they send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.payload import Payload
from fedfuse.data.attacks.free_rider import FreeRider
from fedfuse.data.attacks.noise import Noise
from fedfuse.data.attacks.sign_flip import SignFlip
from fedfuse.models import spec
from fedfuse.runtimes.hostile import Forger, HostileRuntime

MODEL = spec("cnn", {"width": 4, "depth": 1}, input_shape=(1, 4, 4), num_classes=2, seed=0)


class Scripted:
    """Answers with payloads that were written before."""

    def __init__(self, uploads: Mapping[str, Payload | None]) -> None:
        self.uploads, self.is_closed = uploads, False

    def clients(self) -> Mapping[str, ClientFacts]:
        return {client_id: ClientFacts(f"data of {client_id}") for client_id in self.uploads}

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        for request in requests:
            upload = self.uploads[request.client_id]
            data = None if upload is None else upload.encode()
            yield Reply(request.client_id, data, error="" if data else "broken", answer_key=request.answer_key)

    def close(self) -> None:
        self.is_closed = True


def request(client_id: str, sent: Payload | None = None, seed: int = 7) -> Request:
    return Request("m", {}, "task", "ask", client_id, seed, "", "k" * 40, (sent or Payload()).encode())


def hostile(inner: Scripted, forger: Forger, facts: Mapping[str, object] | None = None) -> HostileRuntime:
    def model_of(client_id: str) -> ModelSpec:
        return MODEL

    return HostileRuntime(inner, forger, ["b"], model_of, facts or {"name": "x"})


def answers(runtime: HostileRuntime, sent: Payload | None = None, seed: int = 7) -> dict[str, Payload]:
    requests = [request(client_id, sent, seed) for client_id in runtime.clients()]
    replies = list(runtime.exchange(requests, timeout_s=None, progress=lambda *facts: None))
    assert {reply.answer_key for reply in replies} == {"k" * 40}
    return {reply.client_id: Payload.decode(reply.upload) for reply in replies if reply.upload is not None}


def test_only_the_hostile_client_is_forged_and_scalars_integers_and_curves_stay() -> None:
    upload = Payload(
        {
            "gram": torch.tensor([1.0, -2.0]),
            "curve/train_loss": torch.tensor([3.0]),
            "label_counts": torch.tensor([4, 5]),
            "num_examples": 9,
        }
    )
    found = answers(hostile(Scripted({"a": upload, "b": upload}), SignFlip(factor=2.0)))
    assert found["a"].digest() == upload.digest()
    assert found["b"].tensor("gram").tolist() == [-2.0, 4.0]
    for key in ("curve/train_loss", "label_counts"):
        assert found["b"].tensor(key).equal(upload.tensor(key))
    assert found["b"]["num_examples"] == 9


def test_training_begins_at_what_was_sent_or_at_the_first_weights() -> None:
    module = MODEL.build()
    state = {name: t.detach() for name, t in module.state_dict().items()}
    buffers = {name for name, _ in module.named_buffers()}
    assert buffers
    learned = {name: t + 1 if name not in buffers else t for name, t in state.items()}
    upload = Payload().put_group("model", learned)
    found = answers(hostile(Scripted({"b": upload}), SignFlip(factor=1.0)))["b"]
    for name, t in state.items():
        wanted = t if name in buffers else t - 1
        torch.testing.assert_close(found.tensor(f"model/{name}"), wanted)
        assert found.tensor(f"model/{name}").dtype == t.dtype
    sent = Payload().put_group("model", {name: torch.full_like(t, 3) for name, t in state.items()})
    riding = answers(hostile(Scripted({"b": upload}), FreeRider(noise_std=0.0)), sent)["b"]
    for name, t in state.items():
        assert riding.tensor(f"model/{name}").equal(torch.full_like(t, 3) if t.is_floating_point() else learned[name])


def test_noise_is_derived_from_the_question() -> None:
    inner = Scripted({"b": Payload({"x": torch.ones(5)})})
    first = answers(hostile(inner, Noise()))["b"].digest()
    assert answers(hostile(inner, Noise()))["b"].digest() == first
    assert answers(hostile(inner, Noise()), seed=8)["b"].digest() != first


def test_a_hostile_answer_is_never_taken_for_an_honest_one() -> None:
    inner = Scripted({"a": Payload(), "b": Payload()})
    facts = hostile(inner, Noise(), {"name": "noise", "factor": 4.0}).clients()
    assert facts["a"] == ClientFacts("data of a")
    other = hostile(inner, Noise(), {"name": "noise", "factor": 5.0}).clients()
    assert len({"data of b", facts["b"].fingerprint, other["b"].fingerprint}) == 3


def test_a_failed_reply_stays_failed_and_closing_reaches_the_inner_runtime() -> None:
    inner = Scripted({"b": None})
    runtime = hostile(inner, SignFlip())
    (reply,) = runtime.exchange([request("b")], timeout_s=None, progress=lambda *facts: None)
    assert (reply.upload, reply.error) == (None, "broken")
    runtime.close()
    assert inner.is_closed
