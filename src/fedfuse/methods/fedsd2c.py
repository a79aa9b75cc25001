"""Clients send a few disguised and distilled images, and the server trains on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples, InputSpace
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.data.augment import augment_batch
from fedfuse.methods.distilling import check_numbers, show_inputs, student_of
from fedfuse.methods.raw_inputs import inputs_message, read_inputs
from fedfuse.methods.tasks import LocalTraining
from fedfuse.training import predict
from fedfuse.training.coreset import Coder, PixelCoder, choose, disguise, distil_images, easiest_crops
from fedfuse.training.distillation import Distillation, Learner, check_loss
from fedfuse.training.sgd import batches

_TINY = 1e-8
_BATCH_SIZE = 256


@register_method("fedsd2c", paper="https://arxiv.org/abs/2412.05186", reference="Zhang et al., NeurIPS 2024")
@dataclass(frozen=True, kw_only=True)
class FedSD2C(LocalTraining):
    """Clients pick the images that their model finds easiest, disguise them, and send them with its answers.

    Zhang, Liu and Wang, NeurIPS 2024. Crops with the lowest cross-entropy form a core set; their Fourier amplitudes are
    mixed with those of hard images; then latent values are optimised until the client's model sees in them what it saw
    in the crops. The server's student learns all clients' images with each client's own soft labels.

    Exchanges: ``local_models``; then ``distillates``: every client gets its own model back and uploads images, or
    latent values where there is an autoencoder, and soft labels.

    Departures: soft labels travel, so that the server needs no client's model to make them; every image has crops of
    its own; a partner for the mixture need not be predicted right; classes with few images are kept. Without an
    autoencoder the pixels themselves are optimised.

    Args:
        local: how clients train.
        student: ``{family: ..., its settings}``; the common model if left out.
        distillation: how the student learns.
        num_passes: of the student over all images, at least 1.
        images_per_class: that a client sends at most, at least 1.
        num_crops: crops of each image to choose from, at least 1.
        smallest_crop: least part of an image's area that a crop keeps, in (0, 1]; 1 keeps whole images.
        amplitude_weight: lambda in the paper, how much of the amplitudes is another image's, in [0, 1].
        num_steps: of the optimisation at the client, 0 or more.
        learning_rate: of that optimisation, above 0; the paper takes 0.1 for latent values.
        label_weight: of the label's cross-entropy in it, 0 or more.
        autoencoder: ``none``, or the folder of an artifact whose module has ``encode`` and ``decode``, which clients
            and server have before the run.
    """

    student: Mapping[str, Any] = field(default_factory=dict)
    distillation: Distillation = field(
        default_factory=lambda: Distillation(
            batch_size=64, learning_rate=0.02, weight_decay=1e-4, schedule="cosine", kd_temperature=1.0
        )
    )
    num_passes: int = 60
    images_per_class: int = 20
    num_crops: int = 10
    smallest_crop: float = 0.5
    amplitude_weight: float = 0.8
    num_steps: int = 100
    learning_rate: float = 0.02
    label_weight: float = 0.0
    autoencoder: str = "none"

    def __post_init__(self) -> None:
        for name, least in {"num_passes": 1, "images_per_class": 1, "num_crops": 1, "num_steps": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=f"give at least {least}"
                )
        check_numbers(self, at_least_0=("label_weight",), above_0=("learning_rate",))
        for name, is_fine, words in (
            ("smallest_crop", 0 < self.smallest_crop <= 1, "a number above 0 and at most 1"),
            ("amplitude_weight", 0 <= self.amplitude_weight <= 1, "a number in [0, 1]"),
        ):
            if not is_fine:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=f"give {words}")

    @client_task(
        uploads={
            "distillates/images": "disguised and distilled images, or their latent values",
            "distillates/soft_labels": "the local model's probabilities for each of them",
        },
        settings=(
            "images_per_class",
            "num_crops",
            "smallest_crop",
            "amplitude_weight",
            "num_steps",
            "learning_rate",
            "label_weight",
            "autoencoder",
        ),
    )
    def distil_data(self, client: Client, msg: Payload) -> Payload:
        """Choose, disguise and distil some of the client's images.

        Args:
            client: the client.
            msg: ``model/*``, the client's own model; ``inputs/*``; ``autoencoder``, the digest of the server's.
        """
        inputs, model = read_inputs(msg), client.model.build()
        load_state(model, msg.group("model"))
        coder = read_coder(self.autoencoder, msg.text("autoencoder"))
        raw = Examples(inputs.restore(client.data.train.x), client.data.train.y)
        crops = easiest_crops(
            model,
            raw,
            inputs,
            num_crops=self.num_crops,
            smallest_area=self.smallest_crop,
            draw=client.rng.torch("crops"),
            device=client.device,
        )
        chosen, partners = choose(crops, self.images_per_class, client.data.num_classes)
        own, others = crops.images[chosen], crops.images[partners]
        # An image that has no partner at all is mixed with noise, so that none leaves as it is.
        noise = torch.rand(own.shape, generator=client.rng.torch("noise"))
        others = torch.where((partners < 0)[:, None, None, None], noise, others)
        start = disguise(own, others, self.amplitude_weight, is_pixels=inputs.is_pixels)
        code = distil_images(
            model,
            coder,
            start,
            Examples(own, crops.labels[chosen]),
            inputs,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            label_weight=self.label_weight,
            device=client.device,
            progress=client.progress,
        )
        sent = packed(code, is_pixels=inputs.is_pixels and isinstance(coder, PixelCoder))
        # The answers are those to what the server will see, after all rounding.
        images = unpacked(sent, coder, inputs)
        soft_labels = predict(model, inputs.normalize(images), device=client.device).softmax(1)
        return Payload({"distillates/images": sent, "distillates/soft_labels": soft_labels})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect models, hand each back to its owner for the images, train the student on all of them.

        Args:
            cohort: the clients.
            job: says which model each client owns, and what inputs look like.
        """
        student, shape = student_of(self.student, job), job.model.input_shape
        if len(shape) != 3:
            raise ConfigError(
                f"fedsd2c sends images, and the models take inputs of shape {shape}",
                where="method.name",
                fix="use fedcvae, which sends decoders, or any method that sends models",
            )
        coder, digest = load_coder(self.autoencoder)
        with torch.no_grad():
            code = coder.encode(torch.zeros(1, *shape))
        dtype = torch.uint8 if job.inputs.is_pixels and isinstance(coder, PixelCoder) else torch.float16
        replies = self.local_models(cohort, job)
        message = inputs_message(job.inputs)
        message["autoencoder"] = digest
        messages, numbers = {}, {}
        for client_id in replies:
            upload = replies[client_id]
            messages[client_id] = Payload(message).put_group("model", upload.group("model"))
            counts = upload.tensor("label_counts").clamp(min=0)
            numbers[client_id] = int(counts.clamp(max=self.images_per_class).sum())

        def expect(client_id: str) -> Expectation:
            n = numbers[client_id]
            return {
                "distillates/images": TensorSpec((n, *code.shape[1:]), dtype),
                "distillates/soft_labels": TensorSpec((n, student.num_classes)),
            }

        answers = cohort.ask(self.distil_data, messages, key="distillates", expect=expect)
        images, soft_labels = [], []
        for client_id in answers:
            images.append(unpacked(answers[client_id].tensor("distillates/images"), coder, job.inputs))
            soft_labels.append(checked_soft_labels(answers[client_id].tensor("distillates/soft_labels"), client_id))
        order = torch.argsort(torch.cat(soft_labels).argmax(1), stable=True)
        show_inputs(self.name, torch.cat(images)[order[:: math.ceil(len(order) / 64)]], job)
        learner = Learner(student.build(), self.distillation, job.device)
        self._teach(learner, torch.cat(images), torch.cat(soft_labels), job)
        return Fused(model=Artifact.of(student, detached_state(learner.student)))

    def _teach(self, learner: Learner, images: Tensor, soft_labels: Tensor, job: Job) -> None:
        """Passes over all images; each is checkpointed."""
        x, settings = job.inputs.normalize(images), self.distillation
        # Logits up to a constant of each row, which softmax does not see.
        targets = (soft_labels + _TINY).log()
        kept = job.checkpoints.child(Payload({"x": x, "targets": targets}).digest())
        done = self._continue(learner, kept.load("student"))
        for number in range(done, self.num_passes):
            rng, total = job.rng.child("teach", number), torch.zeros((), device=job.device)
            learner.schedule(number / self.num_passes)
            learner.student.train()
            draw = rng.torch("augment")
            for step, index in enumerate(batches(len(x), settings.batch_size, rng.torch("order"))):
                if step == settings.num_batches:
                    break
                batch = x[index].to(job.device)
                if settings.augment:
                    batch = augment_batch(job.inputs.augment, batch, draw)
                total += learner.step(batch, targets[index].to(job.device))
            check_loss(float(total), "distillation")
            state = Payload({"num_passes": number + 1}).put_group("student", detached_state(learner.student))
            kept.save("student", state.put_group("optimizer", learner.memory()))
            job.progress("fedsd2c: teaching the student", number + 1, self.num_passes)
        learner.student.eval()

    def _continue(self, learner: Learner, state: Payload | None) -> int:
        if state is None:
            return 0
        load_state(learner.student, state.group("student"))
        learner.remember(state.group("optimizer"))
        return int(state.number("num_passes"))


def load_coder(autoencoder: str) -> tuple[Coder, str]:
    """The autoencoder that a setting names.

    Args:
        autoencoder: ``none``, or an artifact's folder.

    Returns:
        The autoencoder, and the digest of its artifact; empty for none.

    Raises:
        ConfigError: it cannot encode and decode.
    """
    if autoencoder == "none":
        return PixelCoder(), ""
    artifact = Artifact.read(autoencoder)
    module: Any = artifact.module().requires_grad_(False)
    if not (callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None))):
        raise ConfigError(
            f"a {type(module).__name__} has no encode and decode",
            where=f"method.autoencoder: {autoencoder}",
            fix="name the artifact of an autoencoder, or use autoencoder: none",
        )
    return module, artifact.digest()


def read_coder(autoencoder: str, digest: str) -> Coder:
    """The client's copy of the autoencoder, which must be the server's.

    Args:
        autoencoder: the setting.
        digest: of the server's.

    Raises:
        ConfigError: they differ.
    """
    coder, own = load_coder(autoencoder)
    if own != digest:
        raise ConfigError(
            "the client's autoencoder is not the server's",
            where=f"method.autoencoder: {autoencoder}",
            fix="give every client the same artifact",
        )
    return coder


def packed(code: Tensor, *, is_pixels: bool) -> Tensor:
    """Images or latent values as they travel.

    Args:
        code: of any shape.
        is_pixels: whether it holds pixels in [0, 1].

    Returns:
        8 bits for pixels, else float16.
    """
    if is_pixels:
        return (code.clamp(0, 1) * 255).round().to(torch.uint8)
    return code.to(torch.float16)


def unpacked(sent: Tensor, coder: Coder, inputs: InputSpace) -> Tensor:
    """Raw images from what travelled.

    Args:
        sent: what :func:`packed` gave.
        coder: decodes it.
        inputs: whether images are pixels.

    Returns:
        Float32, shape ``(n, channels, height, width)``.
    """
    code = sent.float() / 255 if sent.dtype == torch.uint8 else sent.float()
    with torch.no_grad():
        images = torch.cat([coder.decode(part).cpu() for part in code.split(_BATCH_SIZE)])
    return images.clamp(0, 1) if inputs.is_pixels else images


def checked_soft_labels(soft_labels: Tensor, client_id: str) -> Tensor:
    """Refuse soft labels that are no probabilities.

    Args:
        soft_labels: shape ``(n, num_classes)``.
        client_id: whose.

    Raises:
        DataError: a row is below 0, or does not sum to 1.
    """
    if float(soft_labels.min()) < 0 or float((soft_labels.sum(1) - 1).abs().max()) > 1e-3:
        raise DataError(
            "its soft labels are no probabilities", where=f"client {client_id}", fix="leave this client out"
        )
    return soft_labels
