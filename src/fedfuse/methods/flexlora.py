"""The exact sum of adapters, cut down to every client's own rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.adapters import ClientAdapters, check_num_rounds, expected_models, shares_of
from fedfuse.methods.tasks import LocalTraining
from fedfuse.ops.lora import Factors, stacked, truncated
from fedfuse.rules.adapters.rule import check_rank_fits


@register_method("flexlora", paper="https://arxiv.org/abs/2402.11505", reference="Bai et al., NeurIPS 2024")
@dataclass(frozen=True, kw_only=True)
class FlexLora(LocalTraining):
    """The weighted sum of the clients' changes, and its best approximation of each client's rank.

    Bai et al., NeurIPS 2024, algorithm 1. Ranks may differ from client to client: ``model.clients`` gives single
    clients another ``peft.rank``.

    Exchanges: ``num_rounds``; each uploads adapter and head. After every round but the last each client gets the sum
    truncated to its own rank, and trains on from there. With one round it is the question of fedit, flora and
    fedex_lora.

    Departures: the paper builds every full matrix and decomposes it: ``decomposition: svd``. ``qr`` gets the same
    singular values from the stacked factors, for a fraction of the work and memory. Heads are averaged.
    ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train.
        num_rounds: at least 1.
        rank: of the result, at least 1 and below every weight's dimensions; ``None`` is the largest of the clients'.
        decomposition: ``qr`` of the stacked factors, or ``svd`` of the full matrix; both give the same.
    """

    num_rounds: int = 1
    rank: int | None = None
    decomposition: Literal["qr", "svd"] = "qr"

    def __post_init__(self) -> None:
        check_num_rounds(self.num_rounds)
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}", where="method.rank", fix="give at least 1")
        self.local.share(0, self.num_rounds)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Ask, sum, truncate, and again.

        Args:
            cohort: the clients.
            job: the models.
        """
        adapters = ClientAdapters.of(job, self.name)
        for name, module in adapters.common.modules.items():
            check_rank_fits(self.rank, name, module.shape)
        final = adapters.rank if self.rank is None else self.rank
        wanted = sorted({final, adapters.common.rank, *(layout.rank for layout in adapters.own.values())})
        cut: dict[int, dict[str, Factors]] = {}
        others: dict[str, Tensor] = {}
        for number in range(self.num_rounds):
            replies = self._ask(cohort, job, adapters, number, cut, others)
            shares, others = shares_of(replies), adapters.others(replies)
            cut = {rank: {} for rank in wanted}
            for name, parts in adapters.changes(replies):
                whole = self.decomposed(stacked(parts, shares), wanted[-1])
                for rank in wanted:
                    cut[rank][name] = Factors(whole.left[:, :rank], whole.right[:rank])
        return Fused(model=adapters.artifact(job, cut[final], others))

    def decomposed(self, change: Factors, rank: int) -> Factors:
        """The best approximation of a change; its leading columns and rows are the best of lower ranks.

        Args:
            change: the sum over clients.
            rank: at least 1.

        Returns:
            Balanced factors of that rank, or of the change's own where that is lower.
        """
        if self.decomposition == "qr":
            return truncated(change, rank)
        u, s, vh = torch.linalg.svd(change.product(), full_matrices=False)
        roots = s[:rank].sqrt()
        return Factors(u[:, :rank] * roots, roots[:, None] * vh[:rank])

    def _ask(
        self,
        cohort: Cohort,
        job: Job,
        adapters: ClientAdapters,
        number: int,
        cut: Mapping[int, Mapping[str, Factors]],
        others: Mapping[str, Tensor],
    ) -> Replies:
        if self.num_rounds == 1:
            return self.local_models(cohort, job)
        messages = {}
        for client_id in cohort.client_ids:
            message = Payload({"num_epochs": self.local.share(number, self.num_rounds)})
            if number:
                layout = adapters.of_client(client_id)
                message.put_group("model", layout.state(cut[layout.rank], others))
            messages[client_id] = message
        return cohort.ask(self.train_local, messages, key=f"round_{number}", expect=expected_models(job))
