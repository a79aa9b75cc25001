"""First-order local training whose change crosses as coordinates along random directions that both sides know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.changes import (
    BESIDE_UPLOADS,
    add_flat,
    artifact_of,
    beside_expectation,
    flat_parameters,
    load_buffers,
    mean_buffers,
    put_beside,
    start_of,
    train_for_change,
)
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import example_weights
from fedfuse.ops.random_projection import project, rebuild, shares_of
from fedfuse.training import LocalSGD


@register_method("ferret", paper="https://arxiv.org/abs/2409.06277", reference="Shu et al., 2024")
@dataclass(frozen=True, kw_only=True)
class Ferret(Method):
    """Clients train as in FedAvg and upload ``num_coordinates`` numbers, however large the model is.

    Shu et al., 2024, algorithm 1. The change is cut into blocks; each block is multiplied with random vectors that the
    server can make too, more of them where the change is larger. The server rebuilds every client's change and adds the
    mean.

    Exchanges: ``num_rounds``; each uploads ``num_coordinates`` numbers and how they are divided over blocks. From the
    second round on the whole model is sent down.

    Departures: the vectors hold signs instead of truncated normal numbers, which are the same on every machine, and
    have the least error; the rebuilt change is unbiased, whereas the published code leaves out the factor of 3 that its
    nearly uniform numbers need; directions are made from the client's id and the exchange, so no seeds are sent and
    errors of different clients and rounds average out; blocks are cut at equal sizes, and coordinates are divided so
    that the error of all blocks together is least, with a fixed sum; no momentum at the server; what is sent down is
    the model, not everybody's coordinates; ``local.num_epochs`` is the total over all rounds; running statistics of
    BatchNorm layers are sent beside.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
        num_coordinates: K in the paper: numbers per upload, at least one per block. The rebuilt change is as far from
            the true one as ``sqrt(num_parameters / num_coordinates)`` times its length.
        block_entries: parameters per block, at least 1; work at both sides grows with it, the error hardly does.
        scaling: ``unbiased``, or ``least_error``, which is shorter by about K / (K + d) and better for few clients and
            rounds.
    """

    takes_heterogeneous: ClassVar[bool] = False

    local: LocalSGD = field(default_factory=LocalSGD)
    num_rounds: int = 10
    num_coordinates: int = 4096
    block_entries: int = 4096
    scaling: Literal["unbiased", "least_error"] = "unbiased"

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_coordinates", "block_entries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give at least 1")
        # Too few epochs are told now, not when the clients have begun.
        self.local.share(0, self.num_rounds)

    @client_task(
        uploads={
            "projection/coordinates": "inner products of the change of all weights with random directions",
            "projection/shares": "how many of them belong to each block of weights",
            **BESIDE_UPLOADS,
        },
        settings=("local", "num_coordinates", "block_entries"),
    )
    def train_projected(self, client: Client, msg: Payload) -> Payload:
        """Train and upload the projected change.

        Args:
            client: the client.
            msg: ``num_epochs`` and ``round``; from the second round on ``model/*``.
        """
        module = start_of(client, msg)
        change, curves = train_for_change(module, client, self.local, msg)
        blocks = change.split(self.block_entries)
        weights = torch.stack([block.double().norm() * len(block) ** 0.5 for block in blocks])
        shares = shares_of(weights, self.num_coordinates)
        directions = directions_of(client.model, client.id, int(msg.number("round")))
        parts = [
            project(block, num, directions.torch("block", number))
            for number, (block, num) in enumerate(zip(blocks, shares.tolist(), strict=True))
        ]
        upload = Payload({"projection/coordinates": torch.cat(parts).float(), "projection/shares": shares.int()})
        return put_beside(upload, module, len(client.data.train), curves)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Rebuild the clients' changes, add their mean, send, and again.

        Args:
            cohort: the clients.
            job: the common model.

        Raises:
            ConfigError: there are fewer coordinates than blocks.
            DataError: an upload does not divide its coordinates.
        """
        check_homogeneous(job)
        module = job.model.build()
        size = len(flat_parameters(module))
        num_blocks = -(-size // self.block_entries)
        if self.num_coordinates < num_blocks:
            raise ConfigError(
                f"{self.num_coordinates} coordinates are too few for {num_blocks} blocks",
                where="method.num_coordinates",
                fix=f"give at least {num_blocks}, or a larger block_entries",
            )
        expect = {
            "projection/coordinates": TensorSpec((self.num_coordinates,)),
            "projection/shares": TensorSpec((num_blocks,), torch.int32),
            **beside_expectation(job.model),
        }
        for number in range(self.num_rounds):
            message = Payload({"num_epochs": self.local.share(number, self.num_rounds), "round": number})
            if number:
                message.put_group("model", dict(artifact_of(job, module).state))
            replies = cohort.ask(self.train_projected, message, key=f"round_{number}", expect=expect)
            weights = torch.tensor(example_weights(replies), dtype=torch.float64)
            mean = torch.zeros(size, dtype=torch.float64)
            for done, (share, client_id) in enumerate(zip(weights / weights.sum(), replies, strict=True)):
                directions = directions_of(job.model, client_id, number)
                mean += share * self._rebuilt(replies[client_id], size, directions, client_id)
                job.progress("rebuilding", done + 1, len(replies))
            add_flat(module, mean)
            load_buffers(module, mean_buffers(replies))
        return Fused(model=artifact_of(job, module))

    def _rebuilt(self, upload: Payload, size: int, directions: Rng, client_id: str) -> Tensor:
        """The change that an upload stands for, float64, shape ``(size,)``."""
        shares = upload.tensor("projection/shares").long()
        if bool((shares < 1).any()) or int(shares.sum()) != self.num_coordinates:
            raise DataError(
                f"its blocks have {int(shares.sum())} coordinates in all, {self.num_coordinates} came",
                where=f"client {client_id}",
                fix="leave this client out",
            )
        parts = upload.tensor("projection/coordinates").split(shares.tolist())
        sizes = [min(self.block_entries, size - start) for start in range(0, size, self.block_entries)]
        is_least = self.scaling == "least_error"
        found = [
            rebuild(part, length, directions.torch("block", number), has_least_error=is_least)
            for number, (part, length) in enumerate(zip(parts, sizes, strict=True))
        ]
        return torch.cat(found)


def directions_of(spec: ModelSpec, client_id: str, number: int) -> Rng:
    """Where the directions of a client's answer come from; whoever knows the model's first weights knows them.

    Args:
        spec: the common model.
        client_id: the client.
        number: of the round.
    """
    return Rng(spec.seed).child("projection", client_id, number)
