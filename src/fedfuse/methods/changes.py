"""What methods share that send something much smaller than the weights that they changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Replies
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Job
from fedfuse.core.payload import Payload
from fedfuse.methods.tasks import example_weights
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import LocalSGD, train

Curves = Mapping[str, Tensor]

BESIDE_UPLOADS = {
    "buffer/*": "running statistics of normalisation layers, where the model has some",
    "num_examples": "number of training examples",
    "curve/*": "training loss and validation scores",
}
"""What leaves a client beside its change."""


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes; a tied one has one name.

    Args:
        module: the model.

    Returns:
        In the module's order, which all sides keep.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """What a model's state holds beside its parameters.

    Args:
        module: the model.

    Returns:
        Copies on the CPU.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in detached_state(module).items() if name not in parameters}


def load_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put buffers in place; the parameters stay.

    Args:
        module: changed in place.
        buffers: name to tensor; may be empty.
    """
    own = dict(module.named_buffers())
    for name, tensor in buffers.items():
        own[name].data.copy_(tensor)


def beside_expectation(spec: ModelSpec) -> Expectation:
    """What an upload of :data:`BESIDE_UPLOADS` must look like.

    Args:
        spec: the client's model.
    """
    return {**{f"buffer/{name}": tensor for name, tensor in buffers_of(spec.build()).items()}, "num_examples": int}


def put_beside(upload: Payload, module: nn.Module, num_examples: int, curves: Mapping[str, Tensor]) -> Payload:
    """Add what :data:`BESIDE_UPLOADS` declares.

    Args:
        upload: holds the change.
        module: the trained model.
        num_examples: of the client.
        curves: name to values per epoch or step.

    Returns:
        The upload.
    """
    upload["num_examples"] = num_examples
    return upload.put_group("buffer", buffers_of(module)).put_group("curve", curves)


def mean_buffers(replies: Replies) -> dict[str, Tensor]:
    """The clients' buffers, averaged by numbers of examples.

    Args:
        replies: uploads of :data:`BESIDE_UPLOADS`.
    """
    return fuse_uploads(replies.uploads(), Mean(), example_weights(replies), group="buffer")


def artifact_of(job: Job, module: nn.Module) -> Artifact:
    """The artifact of a common model as it is now.

    Args:
        job: says how it is built.
        module: with its weights.
    """
    return Artifact.of(job.model, detached_state(module))


def start_of(client: Client, msg: Payload) -> nn.Module:
    """The model that a client is to start from.

    Args:
        client: the client.
        msg: ``model/*``, else the common first weights.
    """
    module = client.model.build()
    start = msg.group("model")
    if start:
        load_state(module, start)
    return module


def train_for_change(module: nn.Module, client: Client, local: LocalSGD, msg: Payload) -> tuple[Tensor, Curves]:
    """Train a model on a client's data.

    Args:
        module: trained in place.
        client: whose data.
        local: how.
        msg: may hold ``num_epochs`` instead of the settings'.

    Returns:
        The change of all trained parameters, flattened one after the other, float32; and curves.
    """
    before = flat_parameters(module)
    curves = train(
        module,
        client.data.train,
        local,
        rng=client.rng,
        device=client.device,
        num_epochs=int(msg.number("num_epochs")) if "num_epochs" in msg else None,
        augment=client.data.augment,
        validation=client.data.validation,
        progress=client.progress,
    )
    return flat_parameters(module) - before, curves


def flat_parameters(module: nn.Module) -> Tensor:
    """All trained parameters, flattened one after the other.

    Args:
        module: the model.

    Returns:
        Float32 on the CPU, a copy.
    """
    parts = [p.detach().cpu().float().reshape(-1) for p in trained_parameters(module).values()]
    return torch.cat(parts) if parts else torch.empty(0)


def add_flat(module: nn.Module, change: Tensor) -> None:
    """Add a change of all trained parameters.

    Args:
        module: changed in place.
        change: flattened one after the other, as :func:`flat_parameters` has them; float64 keeps most digits.
    """
    position = 0
    with torch.no_grad():
        for parameter in trained_parameters(module).values():
            part = change[position : position + parameter.numel()].view(parameter.shape)
            parameter.copy_((parameter.double() + part.double()).to(parameter.dtype))
            position += parameter.numel()
