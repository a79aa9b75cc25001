"""Sparse updates, up and down: only the largest entries of a change cross."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.client import Client
from fedfuse.core.codecs.packing import pack_places, unpack_places
from fedfuse.core.codecs.topk import largest
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, DataError, PayloadError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.changes import (
    BESIDE_UPLOADS,
    add_flat,
    artifact_of,
    beside_expectation,
    flat_parameters,
    load_buffers,
    mean_buffers,
    put_beside,
    train_for_change,
)
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import example_weights
from fedfuse.training import LocalSGD


@register_method("cellm", paper="https://arxiv.org/abs/2407.20557", reference="Vavekanand and Sam, 2024")
@dataclass(frozen=True, kw_only=True)
class Cellm(Method):
    """FedAvg of what is trained, mostly a LoRA adapter, with about a tenth of its bytes.

    Vavekanand and Sam, 2024: low-rank adapters for little local work, and sparse updates throughout for little
    communication. A client trains all of the adapter but uploads only the largest entries of its change. The server
    adds the mean of these to the adapter that it keeps whole, and sends down the largest entries of what has changed
    since the first weights, which every client knows.

    Exchanges: ``num_rounds``; each uploads a mask and the values under it; from the second round on the same is sent.

    Departures: the paper leaves open how entries are chosen and what becomes of the others. Here the largest of all
    parameters together are chosen, and what is left out is forgotten: clients keep nothing, so they may come and go;
    see ``upload.codec: topk`` for a memory. Any model is taken; what is trained of it counts.
    ``local.num_epochs`` is the total over all rounds; running statistics of BatchNorm layers are sent beside.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
        upload_density: fraction of the trained parameters whose change is uploaded, in (0, 1].
        download_density: fraction whose change since the first weights is sent down, in (0, 1]. It should be larger:
            changes of many clients and rounds are spread over more entries.
    """

    takes_heterogeneous: ClassVar[bool] = False

    local: LocalSGD = field(default_factory=LocalSGD)
    num_rounds: int = 10
    upload_density: float = 0.05
    download_density: float = 0.25

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds}", where="method.num_rounds", fix="give at least 1")
        for name in ("upload_density", "download_density"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(
                    f"{name} is {value:g}", where=f"method.{name}", fix="give a number above 0, at most 1"
                )
        # Too few epochs are told now, not when the clients have begun.
        self.local.share(0, self.num_rounds)

    @client_task(
        uploads={
            "change/values": "the largest changes of weights",
            "change/mask": "which weights these are, one bit per weight",
            "change/places": "which weights these are, as their places",
            **BESIDE_UPLOADS,
        },
        settings=("local", "upload_density"),
    )
    def train_sparse(self, client: Client, msg: Payload) -> Payload:
        """Train and upload the largest changes.

        Args:
            client: the client.
            msg: ``num_epochs``; from the second round on ``total/*``, the change since the first weights, and
                ``buffer/*``.
        """
        module = client.model.build()
        if "total/values" in msg:
            add_flat(module, read_sparse(msg, "total", len(flat_parameters(module))))
            load_buffers(module, msg.group("buffer"))
        change, curves = train_for_change(module, client, self.local, msg)
        upload = put_sparse(Payload(), "change", change, self.upload_density)
        return put_beside(upload, module, len(client.data.train), curves)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Add the mean of what came, send the largest of it all, and again.

        Args:
            cohort: the clients.
            job: the common model.

        Raises:
            DataError: an upload has no change that fits.
        """
        check_homogeneous(job)
        module = job.model.build()
        total = torch.zeros(len(flat_parameters(module)), dtype=torch.float64)
        buffers: dict[str, Tensor] = {}
        expect = self._expectation(job, len(total))
        for number in range(self.num_rounds):
            message = Payload({"num_epochs": self.local.share(number, self.num_rounds)})
            if number:
                put_sparse(message, "total", total, self.download_density).put_group("buffer", buffers)
            replies = cohort.ask(self.train_sparse, message, key=f"round_{number}", expect=expect)
            weights = torch.tensor(example_weights(replies), dtype=torch.float64)
            for share, client_id in zip(weights / weights.sum(), replies, strict=True):
                try:
                    total += share * read_sparse(replies[client_id], "change", len(total))
                except PayloadError as error:
                    raise DataError(error.what, where=f"client {client_id}", fix="leave this client out") from None
            buffers = mean_buffers(replies)
        add_flat(module, total)
        load_buffers(module, buffers)
        return Fused(model=artifact_of(job, module))

    def _expectation(self, job: Job, size: int) -> Expectation:
        """Every client has as many values, so their places take the same form."""
        sample = put_sparse(Payload(), "change", torch.ones(size), self.upload_density)
        tensors = {key: TensorSpec(tuple(sample.tensor(key).shape), sample.tensor(key).dtype) for key in sample}
        return {**tensors, **beside_expectation(job.model)}


def put_sparse(payload: Payload, group: str, change: Tensor, density: float) -> Payload:
    """Write the largest entries of a change.

    Args:
        payload: where to.
        group: of the keys.
        change: shape ``(n,)``.
        density: fraction of the entries.

    Returns:
        The payload.
    """
    places = largest(change, density)
    payload[f"{group}/values"] = change[places].float()
    return payload.put_group(group, pack_places(places, len(change)))


def read_sparse(payload: Payload, group: str, size: int) -> Tensor:
    """Read what :func:`put_sparse` wrote.

    Args:
        payload: may come from anybody.
        group: of the keys.
        size: of the change.

    Returns:
        Float64, shape ``(size,)``.

    Raises:
        PayloadError: it is no change of that size.
    """
    values, parts = payload.tensor(f"{group}/values"), payload.group(group)
    places = unpack_places({name: parts[name] for name in ("mask", "places") if name in parts}, size)
    if len(places) != len(values):
        raise PayloadError(f"{len(values)} values have {len(places)} places", fix="send what put_sparse makes")
    found = torch.zeros(size, dtype=torch.float64)
    found[places] = values.double()
    return found
