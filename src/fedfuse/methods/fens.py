"""An ensemble whose combiner is a tiny network, trained over light rounds on the clients' validation parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fedfuse.core.artifact import detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.proxies import ProxyEnsemble, serve
from fedfuse.methods.rounds import AdaptiveServer
from fedfuse.models.combined import Aggregator
from fedfuse.ops.adaptive import AdaptiveStep
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean

_FIRST_DECAY, _SECOND_DECAY = 0.9, 0.99


@register_method("fens", paper="https://arxiv.org/abs/2411.07182", reference="Allouah et al., NeurIPS 2024")
@dataclass(frozen=True, kw_only=True)
class FENS(ProxyEnsemble):
    """An ensemble of all clients' models under a small network that federated rounds train.

    Allouah et al., NeurIPS 2024: one shot for the models; then FedAdam for a network on all models' logits, on data
    that no model was trained on.

    Exchanges: ``local_models``; ``proxy_logits``: every client gets all models and keeps what they say of its
    validation part; ``aggregator_0``, ``aggregator_1``, ...: only the small network travels.

    Departures: the proxy part is the client's validation part, without augmentation; the last round's network is
    taken, not the best on test data; int8 rounds weights only and needs no calibration data; all clients start from
    the same first weights unless the model's settings say otherwise; fewer rounds with larger server steps.

    Args:
        local: how clients train; with ``patience`` the proxy part also says when to stop.
        quantize: send the models to the clients in int8, and keep them so rounded.
        width: hidden units per model, d in the paper's code, at least 1; few models of many classes need more.
        num_rounds: light rounds, at least 1.
        num_steps: SGD steps of a client per light round, at least 1.
        batch_size: proxy examples per step, at least 1.
        client_learning_rate: of these steps, above 0.
        server_learning_rate: of FedAdam, above 0.
        adaptivity: of FedAdam, above 0: what is added to the root of the second moment.
    """

    width: int = 4
    num_rounds: int = 100
    num_steps: int = 1
    batch_size: int = 128
    client_learning_rate: float = 1.0
    server_learning_rate: float = 0.01
    adaptivity: float = 0.001

    def __post_init__(self) -> None:
        for name in ("width", "num_rounds", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give at least 1")
        for name in ("client_learning_rate", "server_learning_rate", "adaptivity"):
            if not getattr(self, name) > 0:
                fix = "give a number above 0"
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=fix)

    @client_task(
        uploads={"aggregator/*": "weights of the small network after a few steps on the validation part"},
        settings=("width", "num_steps", "batch_size", "client_learning_rate"),
        state=True,
    )
    def train_aggregator(self, client: Client, msg: Payload) -> Payload:
        """A few steps of the small network on the logits that the client kept.

        Args:
            client: the client; its state holds the logits.
            msg: ``aggregator/*`` to start from.
        """
        logits, labels = client.state.tensor("proxy/logits"), client.data.validation.y
        net = Aggregator(logits.shape[1], logits.shape[2], self.width)
        load_state(net, msg.group("aggregator"))
        optimizer = torch.optim.SGD(net.parameters(), lr=self.client_learning_rate)
        for step in range(self.num_steps):
            batch = torch.randperm(len(labels), generator=client.rng.torch("batch", step))[: self.batch_size]
            loss = F.cross_entropy(net(logits[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Payload().put_group("aggregator", detached_state(net))

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, show them to the clients, and train what combines them.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        artifacts, message = self.collect(cohort, job)
        num_proxies = self.logits_at_clients(cohort, job, message)
        with job.rng.ambient("aggregator"):
            net = Aggregator(len(artifacts), job.model.num_classes, self.width)
        state = detached_state(net)
        step = AdaptiveStep(
            kind="adam",
            learning_rate=self.server_learning_rate,
            first_decay=_FIRST_DECAY,
            second_decay=_SECOND_DECAY,
            floor=self.adaptivity,
        )
        server = AdaptiveServer(step, initial_second=0.0)
        expect = {f"aggregator/{name}": tensor for name, tensor in state.items()}
        for number in range(self.num_rounds):
            sent = Payload().put_group("aggregator", state)
            replies = cohort.ask(
                self.train_aggregator, dict.fromkeys(num_proxies, sent), key=f"aggregator_{number}", expect=expect
            )
            counts = [num_proxies[client_id] for client_id in replies]
            state = server.advance(state, fuse_uploads(replies.uploads(), Mean(), counts, group="aggregator"))
            job.progress("training the aggregator", number + 1, self.num_rounds)
        load_state(net, state)
        return serve(artifacts, net)
