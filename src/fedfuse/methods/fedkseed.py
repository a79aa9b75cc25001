"""Training along few thousand directions that seeds stand for: what crosses are their slopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Client
from fedfuse.core.codecs.packing import pack, unpack
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError, DataError, PayloadError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload, Value
from fedfuse.core.seeding import Rng
from fedfuse.methods.changes import (
    BESIDE_UPLOADS,
    artifact_of,
    beside_expectation,
    load_buffers,
    mean_buffers,
    put_beside,
    trained_parameters,
)
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import example_weights
from fedfuse.ops.zeroth_order import seed_probabilities, shift_by_sums
from fedfuse.training.zeroth_order import LocalZerothOrder, train_without_gradients


@register_method("fedkseed", paper="https://arxiv.org/abs/2312.06353", reference="Qin et al., ICML 2024")
@dataclass(frozen=True, kw_only=True)
class FedKSeed(Method):
    """All trained parameters are tuned, and an upload stays under 18 KB however large the model is.

    Qin et al., ICML 2024, algorithm 1. Everybody can make the same ``num_seeds`` random directions z_s. A client's step
    takes one of them, measures the slope of its loss along it from two forward passes, and follows it. So all that the
    client did is one number per direction, and its model is w_0 - lr sum_s a_s z_s; the server adds these numbers up
    and sends the sums.

    Exchanges: ``num_rounds``; each uploads one bit per seed, and one number per seed that was taken; sent is the same.

    Departures: one bit per seed in place of a list of seeds, and one sum per seed in place of each step's slope; the
    clients take part in every round; ``local.num_steps`` is the total over all rounds, so that many rounds compare with
    one at equal local work; running statistics of BatchNorm layers, which no direction holds, are sent beside.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
        num_seeds: K in the paper, at least 1: how many directions there are.
        sampling: every seed is as likely (``uniform``), or those with larger slopes so far are more likely
            (``magnitude``, the paper's FedKSeed-Pro), for which the mean magnitudes are uploaded too.
    """

    takes_heterogeneous: ClassVar[bool] = False

    local: LocalZerothOrder = field(default_factory=LocalZerothOrder)
    num_rounds: int = 10
    num_seeds: int = 4096
    sampling: Literal["uniform", "magnitude"] = "uniform"

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give at least 1")
        # Too few steps are told now, not when the clients have begun.
        self.local.share(0, self.num_rounds)

    @client_task(
        uploads={
            "seeds/taken": "one bit per seed: whether a step took it",
            "seeds/sums": "sum of the slopes of the loss along each seed that was taken",
            "seeds/sizes": "mean magnitude of these slopes",
            **BESIDE_UPLOADS,
        },
        settings=("local", "num_seeds", "sampling"),
    )
    def follow_slopes(self, client: Client, msg: Payload) -> Payload:
        """Make the common model, train it along directions, and upload the slopes.

        Args:
            client: the client.
            msg: ``num_steps``; from the second round on ``total/*`` and ``buffer/*``, with ``sampling: magnitude`` also
                ``probabilities``.
        """
        module = client.model.build()
        rebuild(module, client.model, read_sums(msg, "total", self.num_seeds), self.local.learning_rate)
        load_buffers(module, msg.group("buffer"))
        even = torch.full((self.num_seeds,), 1 / self.num_seeds)
        found = train_without_gradients(
            module,
            client.data.train,
            self.local,
            num_steps=int(msg.number("num_steps")),
            probabilities=msg.tensor("probabilities") if "probabilities" in msg else even,
            directions=directions_of(client.model),
            rng=client.rng,
            device=client.device,
            progress=client.progress,
        )
        upload = put_sums(Payload(), "seeds", found.sums, found.counts > 0)
        if self.sampling == "magnitude":
            upload["seeds/sizes"] = (found.sizes / found.counts)[found.counts > 0].float()
        return put_beside(upload, module, len(client.data.train), {"train_loss": found.losses})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Add up slopes, send the sums, and again; at the end make the model.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        total, seen = torch.zeros(self.num_seeds, dtype=torch.float64), _Magnitudes(self.num_seeds)
        buffers: dict[str, Tensor] = {}
        for number in range(self.num_rounds):
            message = Payload({"num_steps": self.local.share(number, self.num_rounds)})
            if number:
                put_sums(message, "total", total, total != 0).put_group("buffer", buffers)
                if self.sampling == "magnitude":
                    message["probabilities"] = seed_probabilities(seen.mean())
            replies = cohort.ask(self.follow_slopes, message, key=f"round_{number}", expect=self._expectation(job))
            weights = torch.tensor(example_weights(replies), dtype=torch.float64)
            for share, client_id in zip(weights / weights.sum(), replies, strict=True):
                sums = _checked_sums(replies, client_id, self.num_seeds)
                total += share * sums
                if self.sampling == "magnitude":
                    seen.add(replies[client_id], self.num_seeds)
            # Everybody, the server too, makes the model from what is sent: numbers of float32.
            total = total.float().double()
            buffers = mean_buffers(replies)
        module = job.model.build()
        rebuild(module, job.model, total, self.local.learning_rate)
        load_buffers(module, buffers)
        return Fused(model=artifact_of(job, module))

    def _expectation(self, job: Job) -> Expectation:
        sizes = {"seeds/sizes": TensorSpec((None,))} if self.sampling == "magnitude" else {}
        return {
            "seeds/taken": TensorSpec((-(-self.num_seeds // 8),), torch.uint8),
            "seeds/sums": TensorSpec((None,)),
            **sizes,
            **beside_expectation(job.model),
        }


class _Magnitudes:
    """Mean magnitude of the slopes along each seed, over all uploads that hold it."""

    def __init__(self, num_seeds: int) -> None:
        self._sums, self._counts = torch.zeros(num_seeds).double(), torch.zeros(num_seeds).double()

    def add(self, upload: Mapping[str, Value], num_seeds: int) -> None:
        taken = _taken(upload, "seeds", num_seeds)
        sizes = upload["seeds/sizes"]
        assert isinstance(sizes, Tensor)
        if len(sizes) != int(taken.sum()):
            raise DataError("an upload has more or fewer magnitudes than seeds", fix="leave this client out")
        self._sums[taken] += sizes.double()
        self._counts[taken] += 1

    def mean(self) -> Tensor:
        """NaN where a seed was never taken."""
        return self._sums / self._counts


def directions_of(spec: ModelSpec) -> Rng:
    """Where the directions of a model come from; whoever knows its first weights knows them.

    Args:
        spec: the common model.
    """
    return Rng(spec.seed).child("directions")


def rebuild(module: nn.Module, spec: ModelSpec, sums: Tensor, learning_rate: float) -> None:
    """Make the model that slopes stand for.

    Args:
        module: as ``spec`` builds it; changed in place.
        spec: the common model.
        sums: of the slopes, shape ``(num_seeds,)``.
        learning_rate: of the steps.
    """
    parameters = list(trained_parameters(module).values())
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    table = {number: sums[number].item() for number in sums.nonzero().view(-1).tolist()}
    with torch.no_grad():
        shift_by_sums(parameters, directions_of(spec), table, -learning_rate)


def put_sums(payload: Payload, group: str, sums: Tensor, taken: Tensor) -> Payload:
    """Write numbers of some seeds: a bit for each seed, and a number for each that has one.

    Args:
        payload: where to.
        group: of the keys.
        sums: shape ``(num_seeds,)``.
        taken: which count, bool.

    Returns:
        The payload.
    """
    payload[f"{group}/taken"] = pack(taken, 1)
    payload[f"{group}/sums"] = sums[taken].float()
    return payload


def read_sums(payload: Mapping[str, Value], group: str, num_seeds: int) -> Tensor:
    """Read what :func:`put_sums` wrote.

    Args:
        payload: may come from anybody.
        group: of the keys.
        num_seeds: how many seeds there are.

    Returns:
        Float64, shape ``(num_seeds,)``; zeros where there is nothing.

    Raises:
        PayloadError: there are more or fewer numbers than bits.
    """
    found = torch.zeros(num_seeds, dtype=torch.float64)
    if f"{group}/taken" not in payload:
        return found
    taken, sums = _taken(payload, group, num_seeds), payload[f"{group}/sums"]
    assert isinstance(sums, Tensor)
    if len(sums) != int(taken.sum()):
        raise PayloadError(f"{int(taken.sum())} seeds have {len(sums)} sums", fix="send what put_sums makes")
    found[taken] = sums.double()
    return found


def _taken(payload: Mapping[str, Value], group: str, num_seeds: int) -> Tensor:
    bits = payload[f"{group}/taken"]
    assert isinstance(bits, Tensor)
    return unpack(bits, 1, num_seeds).bool()


def _checked_sums(replies: Replies, client_id: str, num_seeds: int) -> Tensor:
    try:
        return read_sums(replies[client_id], "seeds", num_seeds)
    except PayloadError as error:
        raise DataError(error.what, where=f"client {client_id}", fix="leave this client out") from None
