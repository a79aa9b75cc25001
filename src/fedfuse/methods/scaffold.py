"""Federated averaging whose clients correct their drift by control variates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.rounds import Rounds, check_counted_steps, first_weights, moved, parameter_names
from fedfuse.methods.tasks import MODEL_UPLOADS, example_weights, trained_upload
from fedfuse.ops.local_steps import gradient_weights, tilt
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import plain_loss, step_rates

VARIATE_UPLOADS = {**MODEL_UPLOADS, "variate/*": "change of the client's control variate, an average of its gradients"}


@register_method("scaffold", paper="https://arxiv.org/abs/1910.06378", reference="Karimireddy et al., ICML 2020")
@dataclass(frozen=True, kw_only=True)
class Scaffold(Rounds):
    """FedAvg whose local gradients are corrected by what this client's gradients differ from everybody's.

    Karimireddy et al., ICML 2020, algorithm 1 with option II: y <- y - eta_l (g(y) - c_i + c), then
    c_i <- c_i - c + (x - y) / (K eta_l); the server keeps c, the mean of the c_i, and steps x by eta_g.

    Exchanges: ``num_rounds``; each uploads the whole model and the change of the client's variate. The variate itself
    stays at the client.

    Departures: with momentum or a schedule, K eta_l becomes the sum of the weights with which the local gradients
    entered the step, and the correction is part of the gradient that momentum sees; momentum 0 is the paper's.
    Means are weighted by numbers of examples. BatchNorm's running statistics are averaged. Every client takes part in
    every round. ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train; without ``patience``.
        num_rounds: rounds, at least 1.
        server_learning_rate: eta_g in the paper, above 0; 1 takes the clients' mean.
    """

    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counted_steps(self.local, "scaffold")
        if not self.server_learning_rate > 0:
            raise ConfigError(
                f"server_learning_rate is {self.server_learning_rate}",
                where="method.server_learning_rate",
                fix="give a number above 0",
            )

    @client_task(uploads=VARIATE_UPLOADS, settings=("local",), state=True)
    def train_corrected(self, client: Client, msg: Payload) -> Payload:
        """Train with corrected gradients, and renew the client's variate.

        Args:
            client: the client; its state holds its variate.
            msg: ``num_epochs``; from the second round on ``model/*`` to start from and ``variate/*``, the server's.
        """
        module = client.model.build()
        start = msg.group("model")
        if start:
            load_state(module, start)
        first = {name: p.detach().clone() for name, p in module.named_parameters()}
        own, common = client.state.group("variate"), msg.group("variate")
        zeros = {name: torch.zeros_like(p) for name, p in first.items()}
        shift = {name: (common or zeros)[name] - (own or zeros)[name] for name in first}
        on_device = [tensor.to(client.device) for tensor in shift.values()]

        def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return plain_loss(net, x, y) + tilt(net.parameters(), on_device)

        upload = trained_upload(module, client, self.local, msg, loss)
        rates = step_rates(self.local, len(client.data.train), int(msg.number("num_epochs")))
        length = float(gradient_weights(rates, self.local.momentum).sum())
        # The corrected gradients' mean is (x - y) / length; without the correction it is the new variate.
        change = {
            name: (first[name] - p.detach()) / length - (common or zeros)[name] for name, p in module.named_parameters()
        }
        client.state.put_group("variate", {name: (own or zeros)[name] + t for name, t in change.items()})
        return upload.put_group("variate", change)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Send model and variate, train, average both, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        model, names = first_weights(job.model), parameter_names(job.model)
        trained = {name: p.detach() for name, p in job.model.build().named_parameters()}
        expect = {f"variate/{name}": tensor for name, tensor in trained.items()}
        variate = CommonVariate(trained)
        for number in range(self.num_rounds):
            replies = self.ask_round(
                cohort,
                job,
                number,
                model,
                task=self.train_corrected,
                others={"variate": variate.mean()},
                expect=expect,
            )
            counts = example_weights(replies)
            mean = fuse_uploads(replies.uploads(), Mean(), counts)
            model = moved(model, mean, names, self.server_learning_rate)
            change = fuse_uploads(replies.uploads(), Mean(), counts, group="variate")
            variate.add(dict(zip(replies, counts, strict=True)), change)
        return Fused(model=Artifact.of(job.model, model))


@dataclass
class CommonVariate:
    """The mean of all clients' variates, weighted by their examples, kept without keeping the clients' own.

    Args:
        like: name to a tensor of the right shape and dtype.
        counts: client id to its number of examples, of all clients that were ever heard.
    """

    like: Mapping[str, Tensor]
    counts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sum = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.like.items()}

    def add(self, counts: Mapping[str, float], change: Mapping[str, Tensor]) -> None:
        """Take in the changes of one round.

        Args:
            counts: client id to number of examples, of those that answered.
            change: their weighted mean change.
        """
        self.counts.update(counts)
        for name, tensor in change.items():
            self._sum[name] += sum(counts.values()) * tensor.double()

    def mean(self) -> dict[str, Tensor]:
        """The common variate; a client that was never heard has none yet and does not count."""
        total = max(1.0, sum(self.counts.values()))
        return {name: (t / total).to(self.like[name].dtype) for name, t in self._sum.items()}
