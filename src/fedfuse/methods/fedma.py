"""Federated matched averaging: neurons are matched before they are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.starts import LocalStarts
from fedfuse.methods.tasks import MODEL_UPLOADS, example_weights, model_expectation, trained_upload
from fedfuse.models.permuting import Channels, channel_rows, channels_of, made_places, permute, settled_places
from fedfuse.ops.matching import assignment, squared_distances
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean

State = Mapping[str, Tensor]


@register_method("fedma", paper="https://arxiv.org/abs/2002.06440", reference="Wang et al., ICLR 2020")
@dataclass(frozen=True, kw_only=True)
class FedMA(LocalStarts):
    """The mean of the clients' weights after each client's channels are matched with those of the others.

    Wang et al., ICLR 2020, algorithm 1 and equation 2: permutations and means are found in turn, one client at a time
    against the mean of the others, by linear assignment.

    Exchanges: one, ``local_models``, or ``own_models`` from own first weights. With ``num_exchanges`` above 1 the
    paper's layer-wise variant, the first (``layers_0`` from common first weights) and then ``layers_1`` and so on:
    after each the next layers are matched, averaged, sent and frozen, and clients train the rest and upload only that.

    Departures: the head is averaged as all other layers, not per class, because that was measured to be better; layers
    keep their width, so clients are matched one to one and no Beta-Bernoulli process adds neurons; normalisation and
    residual connections follow their channels (the paper leaves them out); after a first pass by incoming weights,
    outgoing weights count too; the search never ends with models that lie farther from their mean than they did
    unpermuted.

    Args:
        local: how clients train.
        first_weights: ``common`` to all clients, or each client's ``own``.
        num_exchanges: groups of layers that are fused one after another, at least 1.
        num_sweeps: most passes over all clients after the first; it ends earlier when nothing changes; 0 is none.
        head_weights: the head is averaged by ``examples`` in all as other layers are, or per ``class`` by the clients'
            examples of that class, as in the paper.
    """

    takes_heterogeneous: ClassVar[bool] = False

    num_exchanges: int = 1
    num_sweeps: int = 10
    head_weights: Literal["examples", "class"] = "examples"

    def __post_init__(self) -> None:
        for name, least in (("num_exchanges", 1), ("num_sweeps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=f"give at least {least}"
                )
        # Too few epochs are told now, not when the clients have begun.
        self.local.share(0, self.num_exchanges)

    @client_task(uploads=MODEL_UPLOADS, settings=("local",))
    def train_upper(self, client: Client, msg: Payload) -> Payload:
        """Train the layers that are not fused yet and upload them.

        Args:
            client: the client.
            msg: ``fused/*``: tensors that stay; ``own/*``: those to train further; ``num_epochs``.
        """
        module = client.model.build()
        fused = msg.group("fused")
        load_state(module, {**fused, **msg.group("own")})
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in fused)
        frozen = [
            layer
            for path, layer in module.named_modules()
            if layer.state_dict() and all(f"{path}.{name}".removeprefix(".") in fused for name in layer.state_dict())
        ]

        def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            # The statistics of a frozen normalisation stay too.
            for layer in frozen:
                layer.eval()
            return F.cross_entropy(net(x).float(), y)

        upload = trained_upload(module, client, self.local, msg, loss)
        return Payload({key: value for key, value in upload.items() if key.removeprefix("model/") not in fused})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Match, average, and with several exchanges send, train the rest, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        channels = channels_of(job.model)
        stops = self._stops(channels)
        replies = self.started_models(cohort, job, self.num_exchanges)
        weights = example_weights(replies)
        states: dict[str, State] = {client_id: replies[client_id].group("model") for client_id in replies}
        for number, (first, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
            matched = match(list(states.values()), weights, channels, first, stop, self.num_sweeps)
            states = dict(zip(states, matched, strict=True))
            job.progress("matching", number + 1, len(stops))
            if number + 1 < len(stops):
                fused = fuse_uploads(matched, Mean(), weights, group="")
                fused = {name: tensor for name, tensor in fused.items() if channels.depths[name] <= stop}
                replies = self._train_rest(cohort, job, states, fused, number + 1)
                states = {client_id: {**fused, **replies[client_id].group("model")} for client_id in replies}
                weights = example_weights(replies)
        return Fused(model=Artifact.of(job.model, self._average(list(states.values()), replies, channels.head)))

    def _stops(self, channels: Channels) -> list[int]:
        """Groups that are matched after each exchange; the head counts as the last layer."""
        num_layers = len(channels.groups) + 1
        if self.num_exchanges > num_layers:
            raise ConfigError(
                f"{num_layers} layers cannot be fused in {self.num_exchanges} exchanges",
                where="method.num_exchanges",
                fix=f"give at most {num_layers}",
            )
        stops = [num_layers * (i + 1) // self.num_exchanges for i in range(self.num_exchanges)]
        return [*stops[:-1], len(channels.groups)]

    def _train_rest(self, cohort: Cohort, job: Job, states: Mapping[str, State], fused: State, number: int) -> Replies:
        messages = {}
        for client_id, state in states.items():
            own = {name: tensor for name, tensor in state.items() if name not in fused}
            message = Payload({"num_epochs": self.local.share(number, self.num_exchanges)})
            messages[client_id] = message.put_group("fused", dict(fused)).put_group("own", own)
        settled = {f"model/{name}" for name in fused}
        expect = {key: value for key, value in model_expectation(job.model).items() if key not in settled}
        return cohort.ask(self.train_upper, messages, key=f"layers_{number}", expect=expect)

    def _average(self, states: Sequence[State], replies: Replies, head: str) -> dict[str, Tensor]:
        weights = example_weights(replies)
        fused = fuse_uploads(states, Mean(), weights, group="")
        if self.head_weights == "class":
            counts = torch.stack([replies[client_id].tensor("label_counts") for client_id in replies]).double()
            # A class that nobody has counts as all others.
            counts[:, counts.sum(0) == 0] = torch.tensor(weights, dtype=torch.float64)[:, None]
            shares = counts / counts.sum(0)
            for name in (f"{head}.weight", f"{head}.bias"):
                if name in fused and len(fused[name]) == shares.shape[1]:
                    rows = torch.stack([state[name].double() for state in states])
                    fused[name] = torch.einsum("kc,kc...->c...", shares, rows).to(fused[name].dtype)
        return fused


def match(
    states: Sequence[State], weights: Sequence[float], channels: Channels, first: int, stop: int, num_sweeps: int
) -> list[dict[str, Tensor]]:
    """Permute the channels of several models so that the models lie near each other.

    The first pass starts from the model of the largest weight and matches the others one after another to the mean of
    those before, each group by what makes its channels, where that brings it nearer. Then sweeps: each model against
    the mean of all others, by all that makes and reads the channels, until nothing comes nearer.

    Args:
        states: state dicts of one architecture.
        weights: of the models, above 0.
        channels: of the architecture.
        first: position of the first group that may be permuted.
        stop: position behind the last; tensors with axes of later groups do not count.
        num_sweeps: most sweeps.

    Returns:
        The permuted state dicts, in the order of the models.
    """
    matched = [dict(state) for state in states]
    order = sorted(range(len(states)), key=lambda k: -weights[k])
    for position, k in enumerate(order[1:], 1):
        reference = _mean([matched[j] for j in order[:position]], [weights[j] for j in order[:position]])
        moved = _forward(matched[k], reference, channels, first, stop)
        if _distance(moved, reference, channels, first, stop) < _distance(matched[k], reference, channels, first, stop):
            matched[k] = moved
    if _spread(matched, weights, channels, first, stop) > _spread(states, weights, channels, first, stop):
        matched = [dict(state) for state in states]
    for _ in range(num_sweeps if len(states) > 1 else 0):
        has_changed = False
        # The model that the others were matched to moves last, and stays where that is enough.
        for k in reversed(order):
            others = [j for j in range(len(states)) if j != k]
            reference = _mean([matched[j] for j in others], [weights[j] for j in others])
            for position in range(first, stop):
                nearer = _improve(matched[k], reference, channels, position, stop)
                if nearer is not None:
                    matched[k], has_changed = nearer, True
        if not has_changed:
            break
    return matched


def _mean(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    return fuse_uploads(states, Mean(), weights, group="")


def _forward(state: State, reference: State, channels: Channels, first: int, stop: int) -> dict[str, Tensor]:
    moved = dict(state)
    for position in range(first, stop):
        places, group = made_places(channels, position), channels.groups[position]
        if not places:
            continue
        cost = squared_distances(channel_rows(reference, places), channel_rows(moved, places))
        moved = permute(moved, group, assignment(cost, group.num_blocks))
    return moved


def _improve(state: State, reference: State, channels: Channels, position: int, stop: int) -> dict[str, Tensor] | None:
    """Permute one group; nothing where that does not bring the state nearer."""
    places, group = settled_places(channels, position, stop), channels.groups[position]
    if not places:
        return None
    cost = squared_distances(channel_rows(reference, places), channel_rows(state, places))
    moved = permute(state, group, assignment(cost, group.num_blocks))
    names = {place.name for place in places}
    # Measured, not read from the cost: a layer from the group into itself is permuted on both axes at once.
    before, after = _sum_of_squares(state, reference, names), _sum_of_squares(moved, reference, names)
    return moved if after < before * (1 - 1e-9) else None


def _distance(state: State, reference: State, channels: Channels, first: int, stop: int) -> float:
    names = {p.name for position in range(first, stop) for p in settled_places(channels, position, stop)}
    return _sum_of_squares(state, reference, names)


def _spread(states: Sequence[State], weights: Sequence[float], channels: Channels, first: int, stop: int) -> float:
    mean = _mean(states, weights)
    return sum(w * _distance(state, mean, channels, first, stop) for w, state in zip(weights, states, strict=True))


def _sum_of_squares(a: State, b: State, names: set[str]) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in sorted(names))
