"""Models aligned to one of them by optimal transport, then averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact, ModelSpec, load_state
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.method import Fused, Job, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.starts import LocalStarts
from fedfuse.methods.tasks import example_weights
from fedfuse.models.permuting import Channels, channel_outputs, channel_rows, channels_of, made_places, transport
from fedfuse.ops.matching import coupling, squared_distances
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean


@register_method("otfusion", paper="https://arxiv.org/abs/1910.05653", reference="Singh and Jaggi, NeurIPS 2020")
@dataclass(frozen=True, kw_only=True)
class OTFusion(LocalStarts):
    """Each client's channels are moved onto those of one reference client, layer by layer, and the models averaged.

    Singh and Jaggi, NeurIPS 2020, algorithm 1: from the input to the output, the channels of a layer are vectors (of
    their incoming weights, or of their activations), and the exact optimal transport plan between both models' vectors
    under the Euclidean distance carries the client's weights over; then the weighted mean.

    Exchanges: one, ``local_models``, or ``own_models`` from own first weights. Clients may own models of one
    architecture in different widths; the result has the reference's.

    Departures: every normalisation and residual connection follows its channels, where the paper's analysis has chains
    of layers; outgoing weights of a merged channel are added, not averaged, so that a network whose channels were split
    is merged back exactly (for equal widths both are the same); clients count by their examples, not equally.

    Args:
        local: how clients train.
        first_weights: ``common`` to all clients, or each client's ``own``, which is the paper's setting.
        match_by: ``weights``; ``activations`` on data of the server's own; or ``nothing``, the plain mean as a control.
        reference: onto which client the others are moved: the one with the ``most_examples``, or the ``largest`` model;
            the first by id among equals.
        num_samples: of the server's data for activations, at least 1.
    """

    takes_heterogeneous: ClassVar[bool] = False

    match_by: Literal["weights", "activations", "nothing"] = "weights"
    reference: Literal["most_examples", "largest"] = "most_examples"
    num_samples: int = 200

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"num_samples is {self.num_samples}", where="method.num_samples", fix="give at least 1")

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Move every client onto the reference and average.

        Args:
            cohort: the clients.
            job: says which model each client owns; its server data where activations are matched.
        """
        if self.match_by == "activations" and job.server_data is None:
            raise ConfigError(
                "activations can be matched on data of the server's only, and there is none",
                where="method.match_by",
                fix="use match_by: weights, or give the server data",
            )
        if self.match_by == "nothing":
            check_homogeneous(job)
        channels = channels_of(job.model)
        for client_id in sorted(job.client_models):
            check_alike(job.model, channels, job.client_models[client_id], f"client {client_id}")
        replies = self.started_models(cohort, job)
        weights = dict(zip(replies, example_weights(replies), strict=True))
        first = max(replies, key=lambda c: weights[c] if self.reference == "most_examples" else _size(replies[c]))
        target = replies[first].group("model")
        wanted = self._answers(job, first, target, channels)
        aligned = []
        for done, client_id in enumerate(replies):
            state = replies[client_id].group("model")
            if client_id != first and self.match_by != "nothing":
                state = align(state, target, channels, self._answers(job, client_id, state, channels), wanted)
            aligned.append(state)
            job.progress("aligning", done + 1, len(replies))
        job.facts["reference"] = first
        fused = fuse_uploads(aligned, Mean(), list(weights.values()), group="")
        return Fused(model=Artifact.of(job.model_of(first), fused))

    def _answers(self, job: Job, client_id: str, state: Mapping[str, Tensor], channels: Channels) -> list[Tensor]:
        if self.match_by != "activations" or job.server_data is None:
            return []
        module = job.model_of(client_id).build()
        load_state(module, state)
        x = job.server_data.x
        chosen = torch.randperm(len(x), generator=job.rng.torch("samples"))[: self.num_samples]
        return channel_outputs(module, channels, x[chosen])


def align(
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    channels: Channels,
    answers: Sequence[Tensor] = (),
    wanted: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """Move the channels of one model onto those of another, from the input to the output.

    Args:
        state: state dict of the model that is moved.
        target: state dict of the model that stays.
        channels: of both.
        answers: of the moved model's channels, one tensor per group, shape ``(size, n)``; matched instead of weights.
        wanted: the same of the other model.

    Returns:
        A state dict of the target's shapes; the target itself if the model is a permuted copy of it.
    """
    moved = dict(state)
    for position, group in enumerate(channels.groups):
        if answers:
            cost = squared_distances(wanted[position], answers[position])
        else:
            places = made_places(channels, position)
            cost = squared_distances(channel_rows(target, places), channel_rows(moved, places))
        moved = transport(moved, group, coupling(cost.sqrt(), group.num_blocks))
    return moved


def check_alike(spec: ModelSpec, channels: Channels, other: ModelSpec, where: str) -> None:
    """Refuse a model that differs from the common one in more than the widths of its hidden layers.

    Args:
        spec: the common model.
        channels: its channels.
        other: the model to check.
        where: whose it is.

    Raises:
        ModelError: it differs.
    """
    own, found = spec.build().state_dict(), other.build().state_dict()
    widths = {(place.name, place.axis) for group in channels.groups for place in group.places}
    is_alike = list(own) == list(found) and all(
        tensor.ndim == found[name].ndim
        and all((name, d) in widths or tensor.shape[d] == found[name].shape[d] for d in range(tensor.ndim))
        for name, tensor in own.items()
    )
    if is_alike:
        groups = channels_of(other).groups
        is_alike = [(g.places, g.num_blocks) for g in groups] == [(g.places, g.num_blocks) for g in channels.groups]
    if not is_alike:
        raise ModelError(
            "its model differs from the common one in more than the widths of its layers",
            where=where,
            fix="give all clients one architecture, or use ensemble, fusefl or a distillation method",
        )


def _size(upload: Payload) -> int:
    return sum(tensor.numel() for tensor in upload.group("model").values())
