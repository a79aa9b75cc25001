"""Federated averaging, in one round or many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedfuse.core.artifact import Artifact
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, Task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.tasks import MODEL_SUMS, LocalTraining, example_weights, model_expectation
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean


@register_method("fedavg", paper="https://arxiv.org/abs/1602.05629", reference="McMahan et al., AISTATS 2017")
@dataclass(frozen=True, kw_only=True)
class FedAvg(LocalTraining):
    """The mean of the clients' weights, weighted by their numbers of examples.

    McMahan et al., AISTATS 2017, algorithm 1, with every client in every round.

    Exchanges: ``num_rounds``; each uploads the whole model. The first is the question that every one-round method
    asks, if there is only one round.

    Departures: BatchNorm's running statistics are averaged like weights; ``local.num_epochs`` is the total over all
    rounds.

    Args:
        local: how clients train.
        num_rounds: rounds of averaging, at least 1.
    """

    takes_heterogeneous: ClassVar[bool] = False
    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"train_local": MODEL_SUMS}

    num_rounds: int = 1

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds}", where="method.num_rounds", fix="give at least 1")
        # Too few epochs are told now, not when the clients have begun.
        self.local.share(0, self.num_rounds)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average, send, train, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        if self.num_rounds == 1:
            return Fused(model=average(self.local_models(cohort, job), job))
        return self.rounds(cohort, job, self.train_local)

    def rounds(self, cohort: Cohort, job: Job, task: Task) -> Fused:
        """Many rounds of one task, with the mean of its uploads sent in the next round.

        Args:
            cohort: the clients.
            job: the common model.
            task: trains from ``model/*`` for ``num_epochs`` and uploads ``model/*``.
        """
        check_homogeneous(job)
        message, expect = Payload(), model_expectation(job.model)
        for number in range(self.num_rounds):
            message["num_epochs"] = self.local.share(number, self.num_rounds)
            replies = cohort.ask(task, message, key=f"round_{number}", expect=expect)
            fused = average(replies, job)
            message = Payload().put_group("model", dict(fused.state))
        return Fused(model=fused)


def average(replies: Replies, job: Job) -> Artifact:
    """The mean of the uploaded models, weighted by numbers of examples, read one tensor at a time.

    Args:
        replies: uploads with ``model/*`` and ``num_examples``.
        job: the common model.
    """
    return Artifact.of(job.model, fuse_uploads(replies.uploads(), Mean(), example_weights(replies)))


def check_homogeneous(job: Job) -> None:
    """Refuse clients that own different models, before any of them works.

    Args:
        job: says which model each client owns.

    Raises:
        ConfigError: some do.
    """
    if job.client_models:
        raise ConfigError(
            "weights of different architectures cannot be averaged",
            where="model.clients",
            fix="use a method for heterogeneous models, such as ensemble or fusefl",
        )
