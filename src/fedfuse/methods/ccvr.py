"""FedAvg's model with its head calibrated on virtual features."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.frozen import FrozenFeatures
from fedfuse.methods.heads import Head, HeadKind
from fedfuse.methods.tasks import MOMENT_UPLOADS, moments_expectation, moments_upload, read_moments
from fedfuse.models.blocks import cut_spec
from fedfuse.ops.moments import pool


@dataclass(frozen=True, kw_only=True)
class CalibratedHead(Head):
    """The common head settings; what is not said is the paper's way.

    Args:
        kind: ``calibrated`` or ``lda``.
    """

    kind: HeadKind = "calibrated"


@register_method("ccvr", paper="https://arxiv.org/abs/2106.05001", reference="Luo et al., NeurIPS 2021")
@dataclass(frozen=True, kw_only=True)
class CCVR(FedAvg):
    """FedAvg's model; its head is then trained on features drawn from Gaussians that fit everybody's data.

    Luo et al., NeurIPS 2021, algorithm 1: of label skew, the head suffers most, and it can be mended without data.

    Exchanges: FedAvg's, ``local_models`` or one per round; then ``moments``: every client gets the averaged model and
    uploads the moments of its features on its own data.

    Departures: clients upload the scatter around their own means, and the server pools it exactly. With
    ``head.kind: lda`` the head is written down in closed form from the same moments instead of being trained.

    Args:
        local: how clients train.
        num_rounds: rounds of averaging before the calibration, at least 1.
        head: how the head is made: ``calibrated``, the paper's way, or ``lda``. The paper draws 100 to 2000 features
            per class.
    """

    head: CalibratedHead = field(default_factory=CalibratedHead)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head.needs_moments:
            raise ConfigError(
                f"the head {self.head.kind} needs no moments, so nothing is calibrated",
                where="method.head.kind",
                fix="use head.kind: calibrated or lda, or the method fedavg",
            )

    @client_task(uploads=MOMENT_UPLOADS, settings=("head",))
    def feature_moments(self, client: Client, msg: Payload) -> Payload:
        """Moments of the averaged model's features on the client's data.

        Args:
            client: the client.
            msg: ``model/*``: the averaged model.
        """
        pieces = cut_spec(client.model, 1).copy()
        pieces.load_whole(msg.group("model"))
        return moments_upload(pieces.blocks[0], client, per_class=self.head.sends_per_class)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average, ask for moments, calibrate the head.

        Args:
            cohort: the clients.
            job: the common model.
        """
        pieces = cut_spec(job.model, 1).copy()
        averaged = super().fuse(cohort, job).model
        assert averaged is not None
        state = dict(averaged.state)
        pieces.load_whole(state)
        width, per_class = pieces.head.in_features, self.head.sends_per_class
        expect = moments_expectation(job.model.num_classes, width, per_class=per_class)
        replies = cohort.ask(self.feature_moments, Payload().put_group("model", state), key="moments", expect=expect)
        moments = pool(read_moments(replies[client_id]) for client_id in replies)
        head = self.head.make([pieces.head], moments, job)
        if pieces.head.bias is None:
            # Without a bias the head of the common architecture cannot hold what was made.
            return Fused(model=FrozenFeatures.of(pieces, job.model).artifact(head))
        named = {f"{pieces.head_name}.{name}": tensor for name, tensor in detached_state(head).items()}
        return Fused(model=Artifact.of(job.model, {**state, **named}))
