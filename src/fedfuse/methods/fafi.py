"""Encoders trained to agree with themselves and with prototypes, fused by their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.data.augment import augment_batch
from fedfuse.methods.tasks import MODEL_UPLOADS, LocalTraining, example_weights, model_expectation, trained_upload
from fedfuse.models.blocks import cut_spec
from fedfuse.models.prototypes import PrototypeEnsemble, Prototypical
from fedfuse.ops.contrast import prototype_contrast, supervised_contrast
from fedfuse.training import predict

Views = Literal["auto", "crop", "flip", "crop_flip", "noise"]

_NUM_NOISE = 256
_SMALLEST_SIDE = 24


@register_method("fafi", paper="https://openreview.net/forum?id=2XvF67vbCK", reference="Zeng et al., ICML 2025")
@dataclass(frozen=True, kw_only=True)
class FAFI(LocalTraining):
    """Encoders side by side whose features were made alike by prototypes and by contrast, before they are sent.

    Zeng et al., ICML 2025. A client trains an encoder f and prototypes P on two views of each example with
    CE(f P, y) + SupCon(f) + CE(P P, identity); the server adds the encoders' features, weighed by how far they are
    from what the encoder says of noise, and compares the sum with the mean prototypes.

    Exchanges: one, ``prototypes``.

    Departures: each example has its own two random views; encoders answer in evaluation mode; features are made unit
    before they are added, because training never sees their length; how informative a feature is weighs that feature
    and not the mean over models, and noise is seen once, by the server; cross-entropy counts once; the optimiser is
    ``local``.

    Args:
        local: how clients train.
        contrast_weight: of SupCon, 0 or more.
        contrast_temperature: of SupCon, above 0.
        prototype_weight: of the term that keeps prototypes apart, 0 or more.
        views: ``crop``, ``flip`` or ``crop_flip`` of images, ``noise`` for any inputs. ``auto`` is the data's own
            augmentation where there is one, else ``crop`` for images with sides of at least 24 pixels, else ``noise``.
        noise_std: standard deviation of ``noise``, above 0; inputs usually have 1.
        fusion: encoders count by ``informative`` features, or by ``examples``, their share of the training examples.
        prototypes: ``mean`` over clients, or each encoder's ``own``; encoders of different widths need ``own``.
    """

    contrast_weight: float = 1.0
    contrast_temperature: float = 0.07
    prototype_weight: float = 1.0
    views: Views = "auto"
    noise_std: float = 0.1
    fusion: Literal["informative", "examples"] = "informative"
    prototypes: Literal["mean", "own"] = "mean"

    def __post_init__(self) -> None:
        for name in ("contrast_weight", "prototype_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give 0 or more")
        for name in ("contrast_temperature", "noise_std"):
            if not getattr(self, name) > 0:
                fix = "give a number above 0"
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=fix)

    @client_task(
        uploads={**MODEL_UPLOADS, "model/*": "weights and buffers of the encoder, and the prototypes"},
        settings=("local", "contrast_weight", "contrast_temperature", "prototype_weight", "views", "noise_std"),
    )
    def train_prototypes(self, client: Client, msg: Payload) -> Payload:
        """Train encoder and prototypes.

        Args:
            client: the client.
            msg: empty; everyone has the same first encoder and prototypes.
        """
        view = viewer(self.views, client.data.augment, client.data.train.x, self.noise_std)
        first, second = (client.rng.torch(name, device=client.device) for name in ("first view", "second view"))
        module = first_prototypical(client.model)

        def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            # The loss needs the module's parts, not what its forward gives.
            features = module.features(torch.cat([view(x, first), view(x, second)]))
            labels = torch.cat([y, y])
            total = F.cross_entropy(features @ module.prototypes.T, labels)
            total = total + self.contrast_weight * supervised_contrast(features, labels, self.contrast_temperature)
            return total + self.prototype_weight * prototype_contrast(module.prototypes)

        # The views are the augmentation.
        bare = replace(client, data=replace(client.data, augment="none"))
        return trained_upload(module, bare, self.local, msg, loss)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Put the encoders side by side and average the prototypes.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        widths = {c: cut_spec(job.model_of(c), 1).head.in_features for c in cohort.client_ids}
        if self.prototypes == "mean" and len(set(widths.values())) > 1:
            raise ConfigError(
                "prototypes of different widths cannot be averaged",
                where="method.prototypes",
                fix="use prototypes: own for clients with different models",
            )
        replies = cohort.ask(
            self.train_prototypes, key="prototypes", expect=lambda c: prototype_expectation(job.model_of(c))
        )
        encoders, prototypes, recipes = [], [], []
        for client_id in replies:
            trained = first_prototypical(job.model_of(client_id))
            load_state(trained, replies[client_id].group("model"))
            encoders.append(trained.encoder.eval())
            prototypes.append(trained.prototypes.detach())
            recipes.append(cut_spec(job.model_of(client_id), 1).recipes[0])
        counts = torch.tensor(example_weights(replies))
        net = PrototypeEnsemble(
            encoders,
            [torch.stack(prototypes).mean(0)] if self.prototypes == "mean" else prototypes,
            counts / counts.sum() if self.fusion == "examples" else torch.full_like(counts, 1 / len(counts)),
            references=noise_references(encoders, job) if self.fusion == "informative" else (),
            recipes=recipes,
        )
        is_opaque = any(job.model_of(client_id).template is not None for client_id in replies)
        return Fused(model=Artifact(net.recipe, detached_state(net), template=net if is_opaque else None))


def first_prototypical(spec: ModelSpec) -> Prototypical:
    """The encoder of a model with its first weights, and first prototypes: the same for all who own that model.

    Args:
        spec: the client's model.
    """
    pieces = cut_spec(spec, 1).copy()
    d = pieces.head.in_features
    prototypes = torch.randn(spec.num_classes, d, generator=Rng(spec.seed).torch("prototypes"))
    return Prototypical(pieces.blocks[0], prototypes)


def prototype_expectation(spec: ModelSpec) -> Expectation:
    """What an upload of encoder and prototypes must look like.

    Args:
        spec: the client's model.
    """
    rest = {key: value for key, value in model_expectation(spec).items() if not key.startswith("model/")}
    return {**rest, **{f"model/{name}": tensor for name, tensor in first_prototypical(spec).state_dict().items()}}


def noise_references(encoders: list[nn.Module], job: Job) -> list[Tensor]:
    """What each encoder says of inputs that hold nothing: the direction of its mean unit feature.

    Args:
        encoders: map inputs to features.
        job: says what inputs look like; random source.

    Returns:
        Unit vectors, ``(d_k,)`` each.
    """
    noise = torch.randn(_NUM_NOISE, *job.model.input_shape, generator=job.rng.torch("noise"))
    return [F.normalize(F.normalize(predict(encoder, noise, device=job.device)).mean(0), dim=0) for encoder in encoders]


def viewer(views: Views, augment: str, x: Tensor, noise_std: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What makes a random view of a batch, each example with its own draw.

    Args:
        views: the setting.
        augment: the data's own augmentation.
        x: some inputs, which decide what ``auto`` means.
        noise_std: of noise.

    Returns:
        From a batch and a generator to a batch of the same shape.

    Raises:
        ConfigError: the inputs are no images but views of images are wanted, or they are no numbers.
    """
    if views == "auto":
        is_large = x.ndim == 4 and min(x.shape[2:]) >= _SMALLEST_SIDE
        views = augment if augment != "none" else "crop" if is_large else "noise"  # type: ignore[assignment]
    if views != "noise":
        return lambda batch, generator: augment_batch(views, batch, generator)
    if not x.is_floating_point():
        raise ConfigError(
            f"inputs of dtype {x.dtype} cannot take noise",
            where="method.views",
            fix="use a method that needs no views, such as ensemble",
        )
    return lambda batch, generator: (
        batch + noise_std * torch.randn(batch.shape, generator=generator, device=generator.device).to(batch.device)
    )
