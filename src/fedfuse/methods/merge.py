"""One fusion rule over the clients' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fedfuse.core.artifact import Artifact
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.core.registry import RULES
from fedfuse.core.settings import from_json
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import LocalTraining, example_weights
from fedfuse.rules import Rule, fuse_uploads


@register_method("merge", reference="fedfuse")
@dataclass(frozen=True, kw_only=True)
class Merge(LocalTraining):
    """The clients' weights fused by any rule of the registry, tensor by tensor.

    TIES (Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708), DARE (Yu et al., ICML 2024,
    https://arxiv.org/abs/2311.03099), task arithmetic (Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089),
    SLERP, Karcher mean, median and others: ``fedfuse list rules``.

    Exchanges: one, ``local_models``.

    Departures: the rules were published for models fine-tuned from one pre-trained model; here the common first
    weights are what the job's model begins with, drawn or pre-trained. Buffers, such as BatchNorm's running statistics,
    are averaged under the rules that are made for weights.

    Args:
        local: how clients train.
        rule: name in the registry of rules.
        rule_settings: that rule's settings.
        weighting: clients count by their numbers of ``examples``, or are all ``equal``, as in the rules' papers.
    """

    takes_heterogeneous: ClassVar[bool] = False

    rule: str = "ties"
    rule_settings: Mapping[str, Any] = field(default_factory=dict)
    weighting: Literal["examples", "equal"] = "examples"

    def __post_init__(self) -> None:
        # An unknown rule or setting is told now, not when the clients have worked.
        self.chosen_rule()

    def chosen_rule(self) -> Rule:
        """The rule with its settings."""
        found: Rule = from_json(RULES.get(self.rule), self.rule_settings, where="method.rule_settings")
        return found

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, fuse them.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        replies = self.local_models(cohort, job)
        first = job.model.build()
        state = fuse_uploads(
            replies.uploads(),
            self.chosen_rule(),
            example_weights(replies) if self.weighting == "examples" else None,
            base=first.state_dict(),
            buffers={name for name, _ in first.named_buffers()},
        )
        return Fused(model=Artifact.of(job.model, state))
