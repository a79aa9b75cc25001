"""Client tasks that several methods ask, so that they ask the same question and share the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import DataError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Job, Method, client_task
from fedfuse.core.payload import Payload
from fedfuse.models.ensemble import check_classifies
from fedfuse.models.foundation import is_foundation
from fedfuse.ops.moments import Moments, class_moments, pack_symmetric, unpack_symmetric
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import LocalSGD, predict, train

MODEL_UPLOADS = {
    "model/*": "weights and buffers of the locally trained model",
    "num_examples": "number of training examples",
    "label_counts": "number of training examples per class",
    "curve/*": "training loss and validation scores per epoch",
}
MODEL_SUMS = {"model/*": "num_examples", "num_examples": "", "label_counts": ""}
"""What a server that only averages models needs of :data:`MODEL_UPLOADS`."""

MOMENT_UPLOADS = {
    "moments/counts": "examples per class",
    "moments/means": "mean feature vector per class",
    "moments/scatter": "spread of the features around the class means, summed over examples",
}


@dataclass(frozen=True, kw_only=True)
class LocalTraining(Method):
    """Methods whose first exchange asks every client to train the common model on its own data.

    Args:
        local: how clients train.
    """

    local: LocalSGD = field(default_factory=LocalSGD)

    @client_task(uploads=MODEL_UPLOADS, settings=("local",))
    def train_local(self, client: Client, msg: Payload) -> Payload:
        """Train the client's model and upload it.

        Args:
            client: the client.
            msg: ``model/*`` to start from, else the common first weights; ``num_epochs`` instead of the settings'.
        """
        module = client.model.build()
        start = msg.group("model")
        if start:
            load_state(module, start)
        return trained_upload(module, client, self.local, msg)

    def local_models(self, cohort: Cohort, job: Job) -> Replies:
        """Ask all clients for their locally trained models; every method that does so asks the same question.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        common = model_expectation(job.model)
        own = {client_id: model_expectation(spec) for client_id, spec in job.client_models.items()}
        return cohort.ask(self.train_local, key="local_models", expect=lambda c: own.get(c, common))


def trained_upload(
    module: nn.Module,
    client: Client,
    local: LocalSGD,
    msg: Payload,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Payload:
    """Train a whole model on a client's data and make the upload of :data:`MODEL_UPLOADS`.

    Args:
        module: trained in place.
        client: whose data.
        local: how.
        msg: may hold ``num_epochs`` instead of the settings'.
        loss: ``(module, x, y)`` to a scalar; cross-entropy if left out.

    Returns:
        Weights, counts and curves.
    """
    curves = train(
        module,
        client.data.train,
        local,
        rng=client.rng,
        device=client.device,
        num_epochs=int(msg.number("num_epochs")) if "num_epochs" in msg else None,
        augment=client.data.augment,
        validation=client.data.validation,
        loss=loss,
        progress=client.progress,
    )
    counts = torch.bincount(client.data.train.y, minlength=client.data.num_classes)
    upload = Payload({"num_examples": len(client.data.train), "label_counts": counts})
    return upload.put_group("model", detached_state(module)).put_group("curve", curves)


def model_expectation(spec: ModelSpec) -> Expectation:
    """What an upload of :data:`MODEL_UPLOADS` must look like.

    Args:
        spec: the client's model.
    """
    tensors = {f"model/{name}": tensor for name, tensor in spec.build().state_dict().items()}
    return {**tensors, "num_examples": int, "label_counts": TensorSpec((spec.num_classes,), torch.int64)}


def example_weights(replies: Replies) -> list[float]:
    """Weights in proportion to the clients' numbers of examples.

    Args:
        replies: uploads with ``num_examples``.

    Returns:
        One per client in client-id order, at least 1 each.

    Raises:
        DataError: a client claims fewer than one example.
    """
    counts = replies.numbers("num_examples")
    for client_id, count in counts.items():
        if count < 1:
            raise DataError(
                f"it claims {count:g} training examples", where=f"client {client_id}", fix="leave this client out"
            )
    return list(counts.values())


def own_models(replies: Replies) -> dict[str, Payload]:
    """Each client's own model, to send back to it with a second question: clients keep nothing of the first.

    Args:
        replies: uploads with ``model/*``.

    Returns:
        Client id to message, in client-id order.
    """
    return {client_id: Payload().put_group("model", replies[client_id].group("model")) for client_id in replies}


def mean_of_those(replies: Replies, answered: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean model of those clients that answered a second question too.

    Args:
        replies: uploads with ``model/*`` and ``num_examples``.
        answered: ids of these clients.

    Returns:
        Their shares of the examples, float64, summing to 1, and the mean of their models, weighted by them.
    """
    weights = dict(zip(replies, example_weights(replies), strict=True))
    uploads = dict(zip(replies, replies.uploads(), strict=True))
    chosen = list(answered)
    shares = torch.tensor([weights[client_id] for client_id in chosen], dtype=torch.float64)
    shares = shares / shares.sum()
    return shares, fuse_uploads([uploads[client_id] for client_id in chosen], Mean(), shares.tolist())


def check_classifiers(job: Job) -> None:
    """Refuse models that have no classes to combine, before any client works.

    Args:
        job: says which model each client owns.

    Raises:
        ModelError: a model writes text or draws pictures.
    """
    specs = [job.model, *job.client_models.values()]
    check_classifies([spec.build() for spec in specs if is_foundation(spec)])


def client_artifact(job: Job, client_id: str, upload: Payload) -> Artifact:
    """The artifact of the model that a client uploaded.

    Args:
        job: says which model the client owns.
        client_id: whose.
        upload: holds ``model/*``.
    """
    return Artifact.of(job.model_of(client_id), upload.group("model"))


def moments_upload(features: nn.Module, client: Client, *, per_class: bool) -> Payload:
    """Moments of a client's training examples under a feature extractor.

    Args:
        features: maps inputs to features, shape ``(n, d)``.
        client: whose data.
        per_class: keep the scatter of each class apart.

    Returns:
        The upload of :data:`MOMENT_UPLOADS`: counts, means, and packed scatter, float32.
    """
    found = predict(features, client.data.train.x, device=client.device)
    moments = class_moments(found, client.data.train.y, client.data.num_classes, per_class=per_class)
    return Payload(
        {
            "moments/counts": moments.counts.long(),
            "moments/means": moments.means.float(),
            "moments/scatter": pack_symmetric(moments.scatter).float(),
        }
    )


def moments_expectation(num_classes: int, d: int, *, per_class: bool) -> Expectation:
    """What an upload of :data:`MOMENT_UPLOADS` must look like.

    Args:
        num_classes: number of classes.
        d: width of the features.
        per_class: whether the scatter of each class is kept apart.
    """
    packed = d * (d + 1) // 2
    return {
        "moments/counts": TensorSpec((num_classes,), torch.int64),
        "moments/means": TensorSpec((num_classes, d)),
        "moments/scatter": TensorSpec((num_classes, packed) if per_class else (packed,)),
    }


def read_moments(upload: Payload) -> Moments:
    """Turn an upload of :data:`MOMENT_UPLOADS` back into moments.

    Args:
        upload: already checked.

    Returns:
        Moments in float64.
    """
    means = upload.tensor("moments/means").double()
    scatter = unpack_symmetric(upload.tensor("moments/scatter").double(), means.shape[1])
    return Moments(upload.tensor("moments/counts").double(), means, scatter)
