"""Regression mean: linear layers fused in closed form from the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload, Value
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import LocalTraining, mean_of_those, own_models
from fedfuse.ops.curvature import gram_merge, scale_off_diagonal
from fedfuse.ops.moments import pack_symmetric, unpack_symmetric
from fedfuse.training.capturing import dense_layers, input_moments, matrix_of, put_matrix


@register_method("regmean", paper="https://arxiv.org/abs/2212.09849", reference="Jin et al., ICLR 2023")
@dataclass(frozen=True, kw_only=True)
class RegMean(LocalTraining):
    """Each linear layer gives outputs as near as can be to each client's, on that client's own inputs.

    Jin et al., ICLR 2023, equation 2 and algorithm 1: ``W = (sum G_i)^-1 sum G_i W_i`` with the Gram matrices
    ``G_i = X_i' X_i`` of the layer's inputs, whose off-diagonals are scaled down; all else is averaged.

    Exchanges: ``local_models``; ``grams``, which sends each client its own model back and gets the Gram matrices. A
    deployment would join the two; apart, the first stays the question that other methods ask too.

    Departures: convolutions are linear layers on their patches; the paper merges transformers only. Directions that no
    client's inputs have keep the mean of the weights. Clients count by their numbers of examples.

    Args:
        local: how clients train.
        off_diagonal: alpha in the paper, what the Gram matrices' off-diagonals are multiplied by, in [0, 1].
        fuse_biases: treat a bias as the weight of an input that is always 1; the paper averages biases.
        num_samples: most training examples that a client looks at, drawn at random; ``None`` is all.
    """

    takes_heterogeneous: ClassVar[bool] = False

    off_diagonal: float = 0.9
    fuse_biases: bool = False
    num_samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.off_diagonal <= 1:
            raise ConfigError(
                f"off_diagonal is {self.off_diagonal}", where="method.off_diagonal", fix="give a number in [0, 1]"
            )
        check_num_samples(self.num_samples)

    @client_task(
        uploads={"grams/*": "second moments of a layer's inputs, per example; a bias counts as an input of 1"},
        settings=("num_samples",),
    )
    def gram_matrices(self, client: Client, msg: Payload) -> Payload:
        """Gram matrices of the inputs of all linear and convolutional layers.

        Args:
            client: the client.
            msg: ``model/*``, the client's own model.
        """
        module = client.model.build()
        load_state(module, msg.group("model"))
        names = list(dense_layers(module, client.model.example_input()))
        x = client.data.train.x[sample(client, self.num_samples)]
        moments = input_moments(module, x, names, device=client.device)
        return Payload({f"grams/{layer_key(n)}": pack_symmetric(moment).float() for n, moment in moments.items()})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect models and Gram matrices, solve layer by layer.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        replies = self.local_models(cohort, job)
        first = job.model.build()
        widths = {
            name: matrix_of(first.state_dict(), name).shape[1]
            for name in dense_layers(first, job.model.example_input())
        }
        expect = {f"grams/{layer_key(name)}": TensorSpec((d * (d + 1) // 2,)) for name, d in widths.items()}
        own = own_models(replies)
        answers = cohort.ask(self.gram_matrices, own, key="grams", expect=expect)
        shares, state = mean_of_those(replies, answers)
        opened = answers.uploads()
        for done, (name, width) in enumerate(widths.items()):
            grams = unpack_symmetric(stacked(opened, f"grams/{layer_key(name)}"), width)
            values = torch.stack([matrix_of(own[c].group("model"), name).double() for c in answers])
            matrix = torch.tensordot(shares, values, 1)
            num_fused = width if self.fuse_biases else matrix_width(first, name)
            scaled = scale_off_diagonal(grams[:, :num_fused, :num_fused], self.off_diagonal)
            matrix[:, :num_fused] = gram_merge(values[:, :, :num_fused], scaled, shares)
            put_matrix(state, name, matrix)
            job.progress("solving layers", done + 1, len(widths))
        return Fused(model=Artifact.of(job.model, state))


def stacked(uploads: Sequence[Mapping[str, Value]], key: str) -> torch.Tensor:
    """One tensor of all clients.

    Args:
        uploads: opened lazily, in client-id order.
        key: full key; the tensor has the same shape in all.

    Returns:
        Shape ``(num_clients, ...)``, float64.
    """
    return torch.stack([value.double() for upload in uploads if isinstance(value := upload[key], torch.Tensor)])


def layer_key(name: str) -> str:
    """A layer's name as the last part of a payload's key.

    Args:
        name: as in ``named_modules``; empty where the model is one layer.
    """
    return name or "model"


def matrix_width(module: torch.nn.Module, name: str) -> int:
    """Columns of a layer's weight as a matrix, without its bias.

    Args:
        module: holds the layer.
        name: of the layer.
    """
    weight = module.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight[0].numel()


def check_num_samples(num_samples: int | None) -> None:
    """Refuse a number of examples that cannot be.

    Args:
        num_samples: at least 1, or ``None`` for all.

    Raises:
        ConfigError: it is less.
    """
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}", where="method.num_samples", fix="give at least 1")


def sample(client: Client, num_samples: int | None) -> torch.Tensor:
    """Positions of the training examples that a client looks at.

    Args:
        client: whose; its random source decides.
        num_samples: most of them; ``None`` is all.

    Returns:
        Shape ``(n,)``, sorted.
    """
    total = len(client.data.train)
    if num_samples is None or num_samples >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=client.rng.torch("sample"))[:num_samples].sort().values
