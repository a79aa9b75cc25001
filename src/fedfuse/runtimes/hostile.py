"""Another runtime, some of whose clients send something else than what their task gave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Reply, Request
from fedfuse.core.coding import Coding, codec_of
from fedfuse.core.cohort import ClientFacts, Runtime
from fedfuse.core.known import Known
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng

# Of normalisation layers, by whatever name a method sends them.
_STATISTICS = ("running_mean", "running_var")


class Forger(Protocol):
    """What a hostile client sends instead of a tensor; an attack of ``fedfuse.data.attacks`` is one."""

    @property
    def forges_buffers(self) -> bool:
        """Whether a model's buffers are forged too."""
        ...

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """The forged tensor.

        Args:
            values: what an honest client would send, float64.
            start: what it was sent under that key, or the first weights; zeros where there is neither.
            generator: where random numbers are drawn from.
        """
        ...


class HostileRuntime:
    """Forges the uploads of some clients of another runtime, as if their machines did; for simulations.

    Floating-point tensors are forged, but no learning curves; integers and scalars stay, and so do a model's buffers
    unless the attack says otherwise. What a hostile client answers
    is never taken for an honest answer: its fingerprint holds the attack.

    Args:
        inner: carries the requests.
        forger: how uploads are forged.
        clients: ids of the hostile clients.
        model_of: client id to the model that it owns; its first weights are where training starts.
        facts: name and settings of the attack, as JSON.
    """

    def __init__(
        self,
        inner: Runtime,
        forger: Forger,
        clients: Sequence[str],
        model_of: Callable[[str], ModelSpec],
        facts: Mapping[str, Any],
    ) -> None:
        self._inner, self._forger, self._hostile = inner, forger, frozenset(clients)
        self._model_of, self._facts = model_of, json.dumps(facts, sort_keys=True)
        self._first: dict[str, tuple[dict[str, Tensor], frozenset[str]]] = {}

    def clients(self) -> Mapping[str, ClientFacts]:
        """All clients by id."""
        return {
            client_id: self._marked(facts) if client_id in self._hostile else facts
            for client_id, facts in self._inner.clients().items()
        }

    def _marked(self, facts: ClientFacts) -> ClientFacts:
        mark = hashlib.sha256(f"{facts.fingerprint}|{self._facts}".encode()).hexdigest()
        return dataclasses.replace(facts, fingerprint=mark)

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        """Carry out the requests and forge the answers of the hostile clients.

        Args:
            requests: at most one per client.
            timeout_s: most seconds that one client may take.
            progress: called with (client id, done, total).

        Yields:
            A reply per request.
        """
        asked = {request.client_id: request for request in requests}
        for reply in self._inner.exchange(requests, timeout_s=timeout_s, progress=progress):
            if reply.client_id in self._hostile and reply.client_id in asked and reply.upload is not None:
                upload = self._forged_as_sent(Payload.decode(reply.upload), asked[reply.client_id])
                reply = dataclasses.replace(reply, upload=upload.encode())
            yield reply

    def _forged_as_sent(self, upload: Payload, request: Request) -> Payload:
        """What a hostile client sends: forged, and then in the codec's words where there is one."""
        if not request.codec:
            return self._forged(upload, request)
        coding = Coding(codec_of(request.codec), Known.of(request.payload, self._model_of(request.client_id)))
        forged = self._forged(Payload(coding.open(upload)), request)
        return coding.encode(forged, Payload(), Rng(request.seed).child("attack"))[0]

    def _forged(self, upload: Payload, request: Request) -> Payload:
        sent = Payload.decode(request.payload)
        first, buffers = self._first_weights(request.client_id)
        rng = Rng(request.seed).child("attack")
        forged = Payload(upload)
        for key, value in upload.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or key.startswith("curve/"):
                continue
            name = key.partition("/")[2]
            known = sent.get(key, first.get(name) if key.startswith("model/") else None)
            start = known if isinstance(known, Tensor) and known.shape == value.shape else None
            is_buffer = name in buffers or name.rpartition(".")[2] in _STATISTICS
            # A variance of about 0 would be no disguise.
            if is_buffer and (start is None or not self._forger.forges_buffers):
                continue
            start = torch.zeros_like(value) if start is None else start
            forged[key] = self._forger.forge(value.double(), start.double(), rng.torch(key)).to(value.dtype)
        return forged

    def _first_weights(self, client_id: str) -> tuple[dict[str, Tensor], frozenset[str]]:
        """State and names of the buffers of the model that a client begins with."""
        spec = self._model_of(client_id)
        if spec.digest not in self._first:
            module = spec.build()
            names = frozenset(name for name, _ in module.named_buffers())
            self._first[spec.digest] = ({name: t.detach() for name, t in module.state_dict().items()}, names)
        return self._first[spec.digest]

    def close(self) -> None:
        """Stop the inner runtime."""
        self._inner.close()
