"""Federated averaging with a dynamic regulariser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.rounds import Rounds, first_weights, parameter_names
from fedfuse.methods.tasks import MODEL_UPLOADS, example_weights, trained_upload
from fedfuse.ops.local_steps import squared_distance, tilt
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import plain_loss


@register_method("feddyn", paper="https://arxiv.org/abs/2111.04263", reference="Acar et al., ICLR 2021")
@dataclass(frozen=True, kw_only=True)
class FedDyn(Rounds):
    """FedAvg whose clients' losses are bent so that their minima agree with the minimum of the common loss.

    Acar et al., ICLR 2021, algorithm 1: a client minimises L_k(w) - <g_k, w> + alpha / 2 |w - w_server|^2, then
    g_k <- g_k - alpha (w_k - w_server); the server keeps h, the mean of the g_k, and sends mean(w_k) - h / alpha.

    Exchanges: ``num_rounds``; each uploads the whole model. g_k stays at the client; the server finds h by itself.

    Departures: local minima are those that SGD reaches in a round; means are weighted by numbers of examples;
    BatchNorm's running statistics are averaged; every client takes part in every round; ``local.num_epochs`` is the
    total over all rounds.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
        regularization: alpha in the paper, above 0. Small values trust the clients, large ones hold them.
    """

    regularization: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.regularization > 0:
            raise ConfigError(
                f"regularization is {self.regularization}", where="method.regularization", fix="give a number above 0"
            )

    @client_task(uploads=MODEL_UPLOADS, settings=("local", "regularization"), state=True)
    def train_dynamic(self, client: Client, msg: Payload) -> Payload:
        """Train on the bent loss, and renew the gradient that bends it.

        Args:
            client: the client; its state holds g_k.
            msg: ``num_epochs``; from the second round on ``model/*`` to start from.
        """
        module = client.model.build()
        start = msg.group("model")
        if start:
            load_state(module, start)
        first = {name: p.detach().clone() for name, p in module.named_parameters()}
        known = client.state.group("gradient")
        own = {name: known.get(name, torch.zeros_like(p)) for name, p in first.items()}
        anchors = [p.to(client.device) for p in first.values()]
        slopes = [-tensor.to(client.device) for tensor in own.values()]

        def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            held = 0.5 * self.regularization * squared_distance(net.parameters(), anchors)
            return plain_loss(net, x, y) + held + tilt(net.parameters(), slopes)

        upload = trained_upload(module, client, self.local, msg, loss)
        steps = {name: p.detach() - first[name] for name, p in module.named_parameters()}
        client.state.put_group(
            "gradient", {name: own[name] - self.regularization * step for name, step in steps.items()}
        )
        return upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Send, train, average and correct, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        model, names = first_weights(job.model), parameter_names(job.model)
        server = DynamicServer(self.regularization)
        for number in range(self.num_rounds):
            replies = self.ask_round(cohort, job, number, model, task=self.train_dynamic)
            counts = dict(zip(replies, example_weights(replies), strict=True))
            mean = fuse_uploads(replies.uploads(), Mean(), list(counts.values()))
            model = {**mean, **server.advance({name: model[name] for name in names}, mean, counts)}
        return Fused(model=Artifact.of(job.model, model))


class DynamicServer:
    """The server's part: h, the mean over all clients of their gradients, and the step that it makes.

    Args:
        regularization: alpha in the paper.
    """

    def __init__(self, regularization: float) -> None:
        self.regularization = regularization
        self._counts: dict[str, float] = {}
        self._sum: dict[str, Tensor] = {}

    def advance(
        self, sent: Mapping[str, Tensor], mean: Mapping[str, Tensor], counts: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The next weights.

        Args:
            sent: what the clients started from.
            mean: the mean of what came back; same names, shapes and dtypes.
            counts: client id to number of examples, of those that answered.

        Returns:
            Name to tensor, in the order of ``sent``.
        """
        self._counts.update(counts)
        answered, known = sum(counts.values()), sum(self._counts.values())
        weights = {}
        for name, tensor in sent.items():
            change = self.regularization * answered * (mean[name].double() - tensor.double())
            self._sum[name] = self._sum.get(name, torch.zeros_like(change)) - change
            weights[name] = (mean[name].double() - self._sum[name] / known / self.regularization).to(tensor.dtype)
        return weights
