"""Federated averaging of normalised changes."""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse.core.artifact import Artifact
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.rounds import Rounds, check_counted_steps, first_weights, moved, parameter_names
from fedfuse.methods.tasks import example_weights
from fedfuse.ops.local_steps import gradient_weights
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import step_rates


@register_method("fednova", paper="https://arxiv.org/abs/2007.07481", reference="Wang et al., NeurIPS 2020")
@dataclass(frozen=True, kw_only=True)
class FedNova(Rounds):
    """FedAvg that counts each client's change per local step, so that clients with more steps do not pull more.

    Wang et al., NeurIPS 2020, equations 7 to 10: x <- x - tau_eff sum_i p_i (x - x_i) / |a_i|, with
    tau_eff = sum_i p_i |a_i| and a_i the weights of the local gradients, momentum and learning rates within.

    Exchanges: ``num_rounds``; each uploads the whole model. The questions are FedAvg's; only the server differs.

    Departures: |a_i| is computed by the server from the client's number of examples; no server momentum; BatchNorm's
    running statistics are averaged by numbers of examples; ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train; without ``patience``.
        num_rounds: rounds, at least 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counted_steps(self.local, "fednova")

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Send, train, average what was gained per step, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        model, names = first_weights(job.model), parameter_names(job.model)
        for number in range(self.num_rounds):
            replies = self.ask_round(cohort, job, number, model)
            counts = example_weights(replies)
            lengths = [self.path_length(int(count), number) for count in counts]
            per_step = [count / length for count, length in zip(counts, lengths, strict=True)]
            # tau_eff times the sum of p_i / |a_i|: at least 1, and 1 where all clients take the same steps.
            stretch = sum(c * a for c, a in zip(counts, lengths, strict=True)) * sum(per_step) / sum(counts) ** 2
            normalised = fuse_uploads(replies.uploads(), Mean(), per_step)
            state = moved(model, normalised, names, stretch)
            mean = fuse_uploads(replies.uploads(), Mean(), counts)
            model = {**mean, **{name: state[name] for name in names}}
        return Fused(model=Artifact.of(job.model, model))

    def path_length(self, num_examples: int, number: int) -> float:
        """The norm |a_i|_1 of a client's gradient weights in a round.

        Args:
            num_examples: that the client trains on.
            number: of the round.
        """
        rates = step_rates(self.local, num_examples, self.local.share(number, self.num_rounds))
        return float(gradient_weights(rates, self.local.momentum).sum())
