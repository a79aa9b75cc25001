"""Federated averaging with an adaptive server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedfuse.core.artifact import Artifact
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.rounds import AdaptiveServer, Rounds, first_weights, parameter_names
from fedfuse.methods.tasks import MODEL_SUMS, example_weights
from fedfuse.ops.adaptive import Adaptive, AdaptiveStep
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean


@register_method("fedadam", paper="https://arxiv.org/abs/2003.00295", reference="Reddi et al., ICLR 2021")
@dataclass(frozen=True, kw_only=True)
class FedAdam(Rounds):
    """FedAvg whose server takes the clients' mean change as a gradient for Adam, Yogi or Adagrad.

    Reddi et al., ICLR 2021, algorithm 2: m <- beta_1 m + (1 - beta_1) D, v by the optimiser,
    x <- x + eta m / (sqrt(v) + tau), with v starting at tau squared and no bias correction.

    Exchanges: ``num_rounds``; each uploads the whole model. The questions are FedAvg's; only the server differs.

    Departures: D is weighted by numbers of examples; every client takes part in every round; BatchNorm's running
    statistics are averaged, not stepped; ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
        optimizer: ``adam``, ``yogi`` or ``adagrad``.
        server_learning_rate: eta in the paper, above 0.
        first_decay: beta_1 in the paper, in [0, 1).
        second_decay: beta_2 in the paper, in [0, 1); adagrad has none.
        adaptivity: tau in the paper, above 0; the larger, the less adaptive.
    """

    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"train_local": MODEL_SUMS}

    optimizer: Adaptive = "adam"
    server_learning_rate: float = 0.03
    first_decay: float = 0.9
    second_decay: float = 0.99
    adaptivity: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("server_learning_rate", "adaptivity"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give a number above 0"
                )
        for name in ("first_decay", "second_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give a number in [0, 1)"
                )

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Send, train, step, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        step = AdaptiveStep(
            kind=self.optimizer,
            learning_rate=self.server_learning_rate,
            first_decay=self.first_decay,
            second_decay=self.second_decay,
            floor=self.adaptivity,
        )
        server = AdaptiveServer(step, initial_second=self.adaptivity**2)
        model, names = first_weights(job.model), parameter_names(job.model)
        for number in range(self.num_rounds):
            replies = self.ask_round(cohort, job, number, model)
            mean = fuse_uploads(replies.uploads(), Mean(), example_weights(replies))
            model = {**mean, **server.advance({name: model[name] for name in names}, mean)}
        return Fused(model=Artifact.of(job.model, model))
