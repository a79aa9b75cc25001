"""A greedy soup of the clients' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import DataError
from fedfuse.core.examples import Examples
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import LocalTraining
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import evaluate

Scores = Mapping[str, tuple[Tensor, int]]
"""Client id to right predictions per candidate, shape ``(num_candidates,)``, and the examples that were looked at."""

_SERVER = "server"


@register_method("greedy_soup", paper="https://arxiv.org/abs/2203.05482", reference="Wortsman et al., ICML 2022")
@dataclass(frozen=True, kw_only=True)
class GreedySoup(LocalTraining):
    """The mean of those clients' models that together do better on held-out data.

    Wortsman et al., ICML 2022, algorithm 1: from the best single model on, each next one is taken into the soup if the
    mean does at least as well with it.

    Exchanges: ``local_models``; then ``single_models``, which sends all models to every client and gets their right
    predictions on its validation part, and ``soup_1``, ``soup_2``, ..., each with one candidate. With labelled
    data of the server's own only the first.

    Departures: the held-out data are spread over the clients; a candidate and the soup so far are compared on the
    clients that judged both. BatchNorm's running statistics are averaged like weights.

    Args:
        local: how clients train.
    """

    takes_heterogeneous: ClassVar[bool] = False

    @client_task(
        uploads={
            "num_correct": "right predictions of each candidate on the validation part",
            "num_validation": "number of validation examples",
        },
        settings=(),
    )
    def judge(self, client: Client, msg: Payload) -> Payload:
        """Count right predictions on the validation part.

        Args:
            client: the client.
            msg: ``num_candidates``, and ``candidate_0/*``, ``candidate_1/*``, ...: their weights.
        """
        held_out = client.data.validation
        module = client.model.build()
        correct = torch.zeros(int(msg.number("num_candidates")), dtype=torch.int64)
        for position in range(len(correct) if len(held_out) else 0):
            load_state(module, msg.group(f"candidate_{position}"))
            correct[position] = num_right(module, held_out, client.device)
            client.progress(position + 1, len(correct))
        return Payload({"num_correct": correct, "num_validation": len(held_out)})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Rank the models, then take in each that does no harm.

        Args:
            cohort: the clients.
            job: the common model; labelled ``server_data``, if there are any, judge instead of the clients.
        """
        check_homogeneous(job)
        replies = self.local_models(cohort, job)
        singles = list(replies)
        if len(singles) == 1:
            return Fused(model=Artifact.of(job.model, replies[singles[0]].group("model")))
        scores = self._scores([replies[c].group("model") for c in singles], "single_models", cohort, job)
        totals = sum(correct for correct, _ in scores.values())
        assert isinstance(totals, Tensor)
        # A stable sort: equal ones stay in the order of their ids.
        order = torch.sort(totals, descending=True, stable=True).indices.tolist()
        members, state = [singles[order[0]]], replies[singles[order[0]]].group("model")
        best: Scores = {c: (correct[order[0]], n) for c, (correct, n) in scores.items()}
        for step, position in enumerate(order[1:], 1):
            candidate = _mean(replies, [*members, singles[position]])
            scores = self._scores([candidate], f"soup_{step}", cohort, job)
            judges = sorted(set(best) & set(scores))
            if sum(int(scores[c][0]) for c in judges) >= sum(int(best[c][0]) for c in judges):
                members, state, best = [*members, singles[position]], candidate, scores
        job.facts["soup"] = sorted(members)
        return Fused(model=Artifact.of(job.model, state))

    def _scores(
        self, candidates: Sequence[Mapping[str, Tensor]], key: str, cohort: Cohort, job: Job
    ) -> dict[str, tuple[Tensor, int]]:
        data = job.server_data
        if data is not None and bool((data.y >= 0).all()):
            module = job.model.build()
            found = []
            for state in candidates:
                load_state(module, state)
                found.append(torch.tensor(num_right(module, data, job.device)))
            return {_SERVER: (torch.stack(found), len(data))}
        message = Payload({"num_candidates": len(candidates)})
        for position, state in enumerate(candidates):
            message.put_group(f"candidate_{position}", state)
        expect = {"num_correct": TensorSpec((len(candidates),), torch.int64), "num_validation": int}
        answers = cohort.ask(self.judge, message, key=key, expect=expect)
        scores = {c: (answers[c].tensor("num_correct"), int(answers[c].number("num_validation"))) for c in answers}
        for client_id, (correct, n) in scores.items():
            if n < 0 or bool((correct < 0).any()) or bool((correct > n).any()):
                raise DataError(
                    f"it claims {correct.tolist()} right predictions on {n} examples",
                    where=f"client {client_id}",
                    fix="leave this client out",
                )
        if not any(n for _, n in scores.values()):
            raise DataError(
                "no client has validation examples to choose the soup by",
                where="data.validation_fraction",
                fix="set it above 0, or give the server data of its own",
            )
        return scores


def _mean(replies: Replies, members: Sequence[str]) -> dict[str, Tensor]:
    uploads = dict(zip(replies, replies.uploads(), strict=True))
    return fuse_uploads([uploads[client_id] for client_id in sorted(members)], Mean())


def num_right(module: nn.Module, examples: Examples, device: torch.device) -> int:
    """How many examples a model gets right.

    Args:
        module: the model.
        examples: at least one.
        device: where.
    """
    return round(evaluate(module, examples, device=device).accuracy * len(examples))
