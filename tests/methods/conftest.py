"""A federation in memory whose messages can be looked at and whose clients can be made to leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfuse.core.artifact import load_state
from fedfuse.core.client import ClientSide, Reply, Request, StateStore
from fedfuse.core.cohort import ClientFacts, Cohort, Terms
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.journal import Journal
from fedfuse.core.method import Fused, Job, Method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.methods.fusefl import FuseFL
from fedfuse.models import spec
from fedfuse.models.blocks import cut_spec
from fedfuse.models.fused import Adaptor, channel_dim
from fedfuse.runtimes.local import LocalRuntime

NUM_CLASSES = 4
IMAGE = (1, 8, 8)


@dataclass
class Watched:
    """The local runtime, with a memory of what crossed."""

    inner: LocalRuntime
    absent: Collection[tuple[str, str]]
    sent: dict[tuple[str, str], Payload] = field(default_factory=dict)
    received: dict[tuple[str, str], Payload] = field(default_factory=dict)
    upload_bytes: dict[tuple[str, str], int] = field(default_factory=dict)

    def clients(self) -> Mapping[str, ClientFacts]:
        return self.inner.clients()

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        present = []
        for request in requests:
            crossing = (request.exchange, request.client_id)
            self.sent[crossing] = Payload.decode(request.payload)
            if crossing in self.absent:
                yield Reply(request.client_id, error="away")
            else:
                present.append(request)
        keys = {request.client_id: request.exchange for request in requests}
        for reply in self.inner.exchange(present, timeout_s=timeout_s, progress=progress):
            if reply.upload is not None:
                crossing = (keys[reply.client_id], reply.client_id)
                self.received[crossing] = Payload.decode(reply.upload)
                self.upload_bytes[crossing] = len(reply.upload)
            yield reply

    def close(self) -> None:
        self.inner.close()


class Federation:
    """Clients with random images of four classes; each class has its own mean image, so that there is much to learn."""

    def __init__(
        self,
        model: str = "cnn",
        *,
        num_clients: int = 3,
        num_examples: Sequence[int] = (24, 32, 40),
        client_models: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
        augment: str = "none",
        identical: bool = False,
        seed: int = 5,
        absent: Collection[tuple[str, str]] = (),
        quorum: float = 1.0,
        journal: Path | None = None,
        input_shape: tuple[int, ...] = IMAGE,
        **settings: Any,
    ) -> None:
        facts: dict[str, Any] = {"input_shape": input_shape, "num_classes": NUM_CLASSES, "seed": 11}
        self.spec = spec(model, settings, **facts)
        own = {c: spec(name, others, **facts) for c, (name, others) in (client_models or {}).items()}
        self.seed = seed
        self.data: dict[str, ClientData] = {}
        for position in range(num_clients):
            n = num_examples[position % len(num_examples)]
            part = examples(n + 8, 0 if identical else position, input_shape)
            self.data[f"client_{position}"] = ClientData(
                Examples(part.x[:n], part.y[:n]), Examples(part.x[n:], part.y[n:]), NUM_CLASSES, augment
            )
        self.states = StateStore()
        sides = {
            client_id: ClientSide(client_id, data, own.get(client_id, self.spec), states=self.states)
            for client_id, data in self.data.items()
        }
        self.runtime = Watched(LocalRuntime(sides, workers=1), absent)
        self.job = Job(model=self.spec, rng=Rng(99), device=torch.device("cpu"), client_models=own)
        self.journal = Journal(journal)
        self.terms = Terms(quorum=quorum)
        self.test = examples(60, 1000, input_shape)

    def fuse(self, method: Method) -> Fused:
        """Run a method; a second one shares the journal and starts a new ledger."""
        self.cohort = Cohort(
            runtime=self.runtime,
            method=method,
            model_of=self.job.model_of,
            seed=self.seed,
            journal=self.journal,
            terms=self.terms,
        )
        with self.job.rng.ambient("fuse"):
            return method.fuse(self.cohort, self.job)

    def rng(self, client_id: str, exchange: str) -> Rng:
        """The random source of a client in an exchange."""
        return Rng(derive_seed(self.seed, client_id, exchange))

    def upload(self, exchange: str, client_id: str) -> Payload:
        """What a client uploaded in an exchange."""
        return self.runtime.received[exchange, client_id]

    def kept(self, client_id: str) -> list[Payload]:
        """What a client kept after each exchange that it answered, in order."""
        names = [name for c, name in self.states._memory if c == client_id and name.endswith(".state")]
        return [self.states.load(client_id, name.removesuffix(".state")) for name in names]

    def composed(self, method: FuseFL, inputs: Tensor) -> Tensor:
        """The fused features of FuseFL, put together by hand from the uploads in the journal."""
        entries = self.journal.entries()
        uploads = {(e.facts["exchange"], e.facts["client"]): e.payload() for e in entries}
        level, channels, ndim = inputs, list[int](), 0
        for k in range(method.num_blocks):
            maps = []
            for client_id in [c for c in self.cohort.client_ids if (f"block_{k}", c) in uploads]:
                upload = uploads[f"block_{k}", client_id]
                pieces = cut_spec(self.job.model_of(client_id), method.num_blocks)
                block = pieces.copy().blocks[k]
                load_state(block, upload.group("block"))
                entrance = level
                if k:
                    adaptor = Adaptor(method.adaptor, channels, pieces.interfaces[k - 1][0], ndim)
                    load_state(adaptor, {name: t.float() for name, t in upload.group("adaptor").items()})
                    entrance = adaptor.eval()(level)
                maps.append(block.eval()(entrance))
            channels, ndim = [m.shape[channel_dim(m.ndim)] for m in maps], maps[0].ndim
            level = torch.cat(maps, channel_dim(ndim))
        if method.head.sees == "mean":
            level = level.unflatten(1, (len(channels), -1)).mean(1)
        return level.detach()

    def message(self, exchange: str, client_id: str) -> Payload:
        """What a client was sent in an exchange."""
        return self.runtime.sent[exchange, client_id]


def examples(n: int, seed: int, input_shape: tuple[int, ...] = IMAGE) -> Examples:
    means = torch.randn(NUM_CLASSES, *input_shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(100 + seed)
    y = torch.randint(0, NUM_CLASSES, (n,), generator=generator)
    x = means[y] + 0.5 * torch.randn(n, *input_shape, generator=generator)
    return Examples(x, y)


@pytest.fixture
def federation() -> type[Federation]:
    """Makes federations."""
    return Federation


@pytest.fixture
def x() -> Tensor:
    """Some inputs."""
    return examples(20, 77).x
