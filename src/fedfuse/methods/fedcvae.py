"""Clients send small decoders that make inputs of a class, and the server trains on what these make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples, InputSpace
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.distilling import check_numbers, show_inputs, student_of
from fedfuse.methods.raw_inputs import inputs_message, read_inputs
from fedfuse.methods.tasks import example_weights
from fedfuse.models.autoencoder import ConditionalDecoder, ConditionalEncoder
from fedfuse.ops.variational import reconstruction_loss, truncated_normal
from fedfuse.training import LocalSGD, train
from fedfuse.training.autoencoding import Autoencoding, descend, train_conditional

_BATCH_SIZE = 512


@register_method(
    "fedcvae", paper="https://openreview.net/forum?id=_hb4vM3jspB", reference="Heinbaugh et al., ICLR 2023"
)
@dataclass(frozen=True, kw_only=True)
class FedCVAE(Method):
    """Every client uploads the decoder of a conditional autoencoder; a classifier learns what the decoders draw.

    Heinbaugh, Luz-Ricca and Shao, ICLR 2023, algorithms 1 (FedCVAE-Ens) and 2 (FedCVAE-KD). No classifier is trained
    at a client, so it does not matter which model it owns.

    Exchanges: one, ``decoders``: every client gets the normalisation of the inputs, trains a conditional variational
    autoencoder on its data, and uploads the decoder and how many examples it has of each class.

    Departures: client and label are drawn together, from the table of all clients' label counts. Pixels have a
    Bernoulli likelihood, other inputs a Gaussian one. The prior stays at 0; the paper moves it. Clients train for
    ``autoencoding.num_epochs``; of ``local`` there is nothing to train.

    Args:
        local: how clients train their models in other methods; not used here, so that comparisons can share it.
        student: ``{family: ..., its settings}`` of the classifier; the common model if left out.
        variant: ``ensemble`` draws from the clients' decoders, ``distilled`` teaches one decoder what they draw and
            draws from that one (FedCVAE-KD in the paper).
        autoencoding: how clients train their autoencoders, and the server its decoder.
        classifier: how the server trains the classifier.
        num_draws: inputs that are drawn, at least 2.
        truncation: latent vectors are standard normal, cut off at this distance from 0; above 0.
    """

    local: LocalSGD = field(default_factory=LocalSGD)
    student: Mapping[str, Any] = field(default_factory=dict)
    variant: Literal["ensemble", "distilled"] = "ensemble"
    autoencoding: Autoencoding = field(default_factory=Autoencoding)
    classifier: LocalSGD = field(default_factory=lambda: LocalSGD(num_epochs=10))
    num_draws: int = 5000
    truncation: float = 2.0

    def __post_init__(self) -> None:
        check_numbers(self, above_0=("truncation",))
        if self.num_draws < 2:
            raise ConfigError(f"num_draws is {self.num_draws}", where="method.num_draws", fix="give at least 2")

    @client_task(
        uploads={
            "decoder/*": "weights of a network that makes inputs of a class from noise",
            "num_examples": "number of training examples",
            "label_counts": "number of training examples per class",
            "curve/*": "loss of the autoencoder per epoch",
        },
        settings=("autoencoding",),
    )
    def train_decoder(self, client: Client, msg: Payload) -> Payload:
        """Train an autoencoder on the client's data and upload its decoder; the encoder stays.

        Args:
            client: the client.
            msg: ``inputs/*``, the normalisation of the inputs.
        """
        inputs, settings, part = read_inputs(msg), self.autoencoding, client.data.train
        if len(part) == 0:
            raise DataError("there are no examples to train on", fix="give every client at least one training example")
        shape, num_classes = tuple(part.x.shape[1:]), client.data.num_classes
        decoder = empty_decoder(settings, shape, num_classes, inputs, client.rng)
        with client.rng.ambient("encoder"):
            encoder = ConditionalEncoder(
                shape, num_classes=num_classes, latent_size=settings.latent_size, width=settings.width
            )
        curve = train_conditional(
            encoder,
            decoder,
            Examples(as_decoded(inputs, part.x), part.y),
            settings,
            rng=client.rng,
            device=client.device,
            progress=client.progress,
        )
        upload = Payload({"num_examples": len(part), "label_counts": torch.bincount(part.y, minlength=num_classes)})
        return upload.put_group("decoder", detached_state(decoder)).put_group("curve", {"train_loss": curve})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the decoders, draw from them, train the classifier.

        Args:
            cohort: the clients.
            job: the common model, what inputs look like.
        """
        student = student_of(self.student, job)
        sketch = empty_decoder(self.autoencoding, student.input_shape, student.num_classes, job.inputs, job.rng)
        expect: Expectation = {
            **{f"decoder/{name}": tensor for name, tensor in sketch.state_dict().items()},
            "num_examples": int,
            "label_counts": TensorSpec((student.num_classes,), torch.int64),
            "curve/train_loss": TensorSpec((self.autoencoding.num_epochs,)),
        }
        replies = cohort.ask(self.train_decoder, inputs_message(job.inputs), key="decoders", expect=expect)
        counts = label_table(replies)
        decoders = []
        for client_id in replies:
            decoder = empty_decoder(self.autoencoding, student.input_shape, student.num_classes, job.inputs, job.rng)
            load_state(decoder, replies[client_id].group("decoder"))
            decoders.append(decoder.to(job.device).eval())
        latent, labels, drawn = self._drawn(decoders, counts, job, "draws")
        if self.variant == "distilled":
            one = self._one_decoder(sketch, latent, labels, drawn, job)
            latent, labels, drawn = self._drawn([one], counts.sum(0, keepdim=True), job, "draws of one")
        order = torch.argsort(labels[:512], stable=True)
        show_inputs(self.name, drawn[order[:: math.ceil(len(order) / 64)]], job)
        return Fused(model=self._classifier(student, drawn, labels, job))

    def _drawn(
        self, decoders: list[ConditionalDecoder], counts: Tensor, job: Job, stream: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latent vectors, labels, and what decoders make of them, client and label drawn by their counts."""
        rng = job.rng.child(stream)
        cells = torch.multinomial(
            counts.flatten().double(), self.num_draws, replacement=True, generator=rng.torch("cells")
        )
        owners, labels = cells // counts.shape[1], cells % counts.shape[1]
        size = (self.num_draws, self.autoencoding.latent_size)
        latent = truncated_normal(size, self.truncation, rng.torch("latent"))
        shape = decoders[0].net.input_shape
        drawn = torch.empty(self.num_draws, *shape)
        for number, decoder in enumerate(decoders):
            for index in (owners == number).nonzero()[:, 0].split(_BATCH_SIZE):
                with torch.no_grad():
                    drawn[index] = decoder(latent[index].to(job.device), labels[index].to(job.device)).cpu()
        return latent, labels, drawn

    def _one_decoder(
        self, decoder: ConditionalDecoder, latent: Tensor, labels: Tensor, drawn: Tensor, job: Job
    ) -> ConditionalDecoder:
        """Teach one decoder what the clients' decoders make of the same latent vectors and labels."""
        decoder.to(job.device)
        where = [tensor.to(job.device) for tensor in (latent, labels, drawn)]

        def loss(index: Tensor, draw: torch.Generator) -> Tensor:
            z, y, target = (tensor[index.to(job.device)] for tensor in where)
            return reconstruction_loss(decoder.parameters_of(z, y), target, is_pixels=decoder.is_pixels).mean()

        descend(
            decoder,
            self.num_draws,
            self.autoencoding,
            loss,
            rng=job.rng.child("one decoder"),
            progress=lambda done, total: job.progress("fedcvae: one decoder from many", done, total),
        )
        return decoder

    def _classifier(self, student: ModelSpec, drawn: Tensor, labels: Tensor, job: Job) -> Artifact:
        module = student.build()
        # Decoders of other inputs than pixels work in normalised space already.
        x = job.inputs.normalize(drawn) if job.inputs.is_pixels else drawn
        train(
            module,
            Examples(x, labels),
            self.classifier,
            rng=job.rng.child("classifier"),
            device=job.device,
            augment=job.inputs.augment,
            progress=lambda done, total: job.progress("fedcvae: training the classifier", done, total),
        )
        return Artifact.of(student, detached_state(module))


def empty_decoder(
    settings: Autoencoding, input_shape: tuple[int, ...], num_classes: int, inputs: InputSpace, rng: Rng
) -> ConditionalDecoder:
    """A decoder that has not learned anything yet.

    Args:
        settings: its size.
        input_shape: of one input.
        num_classes: number of classes.
        inputs: whether it makes pixels.
        rng: decides its first weights.
    """
    with rng.ambient("decoder"):
        return ConditionalDecoder(
            input_shape,
            num_classes=num_classes,
            latent_size=settings.latent_size,
            width=settings.width,
            is_pixels=inputs.is_pixels,
        )


def as_decoded(inputs: InputSpace, x: Tensor) -> Tensor:
    """Inputs as a decoder makes them: raw pixels, or other inputs in normalised space, where one variance fits all.

    Args:
        inputs: what inputs look like.
        x: as models see them, shape ``(n, *input_shape)``.
    """
    return inputs.restore(x) if inputs.is_pixels else x


def label_table(replies: Replies) -> Tensor:
    """How many examples each client says that it has of each class.

    Args:
        replies: uploads with ``num_examples`` and ``label_counts``.

    Returns:
        Shape ``(num_clients, num_classes)``, int64, in client-id order.

    Raises:
        DataError: the counts of a client are below 0, or do not add up.
    """
    totals = example_weights(replies)
    counts = torch.stack([replies[client_id].tensor("label_counts") for client_id in replies])
    for client_id, row, total in zip(replies, counts, totals, strict=True):
        if int(row.min()) < 0 or int(row.sum()) != total:
            raise DataError(
                f"its label counts {row.tolist()} are not those of {total:g} examples",
                where=f"client {client_id}",
                fix="leave this client out",
            )
    return counts
