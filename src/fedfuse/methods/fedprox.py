"""Federated averaging with a proximal term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.tasks import MODEL_SUMS, MODEL_UPLOADS, trained_upload
from fedfuse.training import plain_loss


@register_method("fedprox", paper="https://arxiv.org/abs/1812.06127", reference="Li et al., MLSys 2020")
@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients are held near the weights that they were sent.

    Li et al., MLSys 2020, algorithm 2: the local loss gains mu / 2 times the squared distance to the start.

    Exchanges: ``num_rounds``; each uploads the whole model.

    Departures: every client trains the same number of epochs (no stragglers); buffers are not held.

    Args:
        local: how clients train.
        num_rounds: rounds of averaging, at least 1.
        proximal_weight: mu in the paper, 0 or more; 0 is FedAvg.
    """

    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"train_proximal": MODEL_SUMS}

    proximal_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.proximal_weight >= 0:
            raise ConfigError(
                f"proximal_weight is {self.proximal_weight}", where="method.proximal_weight", fix="give 0 or more"
            )

    @client_task(uploads=MODEL_UPLOADS, settings=("local", "proximal_weight"))
    def train_proximal(self, client: Client, msg: Payload) -> Payload:
        """Train near the weights that were sent.

        Args:
            client: the client.
            msg: ``model/*`` to start from, else the common first weights; ``num_epochs``.
        """
        module = client.model.build()
        start = msg.group("model")
        if start:
            load_state(module, start)
        anchors = [p.detach().to(client.device, copy=True) for p in module.parameters()]

        def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            distance = torch.stack(
                [(p - a).square().sum() for p, a in zip(net.parameters(), anchors, strict=True)]
            ).sum()
            return plain_loss(net, x, y) + 0.5 * self.proximal_weight * distance

        return trained_upload(module, client, self.local, msg, loss)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average, send, train near what was sent, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        return self.rounds(cohort, job, self.train_proximal)
