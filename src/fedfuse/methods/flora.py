"""Adapters stacked: the exact sum, whatever their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfuse.core.method import register_method
from fedfuse.methods.adapters import FoldingRounds
from fedfuse.ops.lora import Factors, stacked
from fedfuse.rules.adapters.rule import within_shape


@register_method("flora", paper="https://arxiv.org/abs/2409.05976", reference="Wang et al., NeurIPS 2024")
@dataclass(frozen=True, kw_only=True)
class Flora(FoldingRounds):
    """Clients' LoRA factors side by side, so that their product is the exact weighted sum of the clients' changes.

    Wang et al., NeurIPS 2024, algorithm 1. Ranks may differ from client to client: ``model.clients`` gives single
    clients another ``peft.rank``.

    Exchanges: ``num_rounds``; each uploads adapter and head. After every round but the last the stacked factors go to
    all clients, who add their product to the base's weights and start a fresh adapter. With one round it is the
    question of fedit, fedex_lora and flexlora.

    Departures: a fresh adapter is the common first one again, so that B is zero and A is everybody's. Heads are
    averaged. The published code tells A from B by which side is as long as the rank, which fails in narrow weights;
    here names tell. Where the ranks of a stack add up to more than the weight's smaller side, the same sum travels at
    that side. ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train.
        num_rounds: at least 1.
    """

    def split(self, parts: Sequence[Factors], shares: Sequence[float]) -> tuple[Factors, Factors | None]:
        """Everything goes into the base.

        Args:
            parts: one per client.
            shares: of the examples, one per client.

        Returns:
            The exact sum, and nothing.
        """
        return within_shape(stacked(parts, shares)), None
