"""A frozen feature extractor that all clients have in common, and the methods that only make a head on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, ModelSpec, Recipe, detached_state
from fedfuse.core.client import Client
from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.method import Job, Method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import derive_seed
from fedfuse.methods.heads import linear
from fedfuse.models.blocks import Pieces, cut_spec
from fedfuse.models.foundation import is_foundation
from fedfuse.models.foundation.transformers import Features, TextClassifier
from fedfuse.models.headed import DiagonalGaussians, Headed
from fedfuse.models.random_features import RandomFeatures
from fedfuse.training import LocalSGD, predict, train

BackboneKind = Literal["auto", "model", "patches", "relu", "fourier", "pixels"]


@dataclass(frozen=True)
class FrozenFeatures:
    """A feature extractor, ready to use.

    Args:
        module: maps inputs to vectors.
        recipe: what rebuilds it.
        width: of the vectors.
        is_opaque: whether no recipe can rebuild it.
    """

    module: nn.Module
    recipe: Recipe
    width: int
    is_opaque: bool = False

    @classmethod
    def of(cls, pieces: Pieces, spec: ModelSpec) -> FrozenFeatures:
        """The features of a model that was cut into one block and its head.

        Args:
            pieces: with the weights that count.
            spec: the model.
        """
        return cls(pieces.blocks[0], pieces.recipes[0], pieces.head.in_features, spec.template is not None)

    @classmethod
    def of_foundation(cls, spec: ModelSpec) -> FrozenFeatures:
        """The features of a foundation model with its first weights.

        Args:
            spec: the model.

        Raises:
            ConfigError: it is no classifier.
        """
        model = spec.build()
        if not isinstance(model, TextClassifier):
            raise ConfigError(
                "the model is no classifier, so it has no features for a head",
                where="model.task",
                fix="use task: encoder or sequence_classifier",
            )
        return cls(Features(model), {"kind": "foundation_features", "of": spec.recipe}, model.feature_width)

    def artifact(self, head: nn.Linear | DiagonalGaussians) -> Artifact:
        """The classifier of these features and a head.

        Args:
            head: maps the features to logits.
        """
        net = Headed(self.module, head, recipe=self.recipe)
        return Artifact(net.recipe, detached_state(net), template=net if self.is_opaque else None)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Features that nobody trains, the same at every client.

    Args:
        kind: ``model``: what the common model with its first weights gives to its head, for models that are
            pre-trained; ``patches``: random filters over the patches of an image; ``relu`` and ``fourier``: random
            features of any input; ``pixels``: the input itself. ``auto`` is ``model`` where the common model brings
            weights, else ``patches`` for images and ``relu`` for other inputs.
        num_features: random features, at least 1; what a client uploads grows with it or with its square.
        bandwidth: scale of the frequencies of ``fourier``, above 0.
        patch_size: side of a patch, an odd number.
        grid_size: cells along each side of an image over which patches are averaged, at least 1.
    """

    kind: BackboneKind = "auto"
    num_features: int = 512
    bandwidth: float = 1.0
    patch_size: int = 5
    grid_size: int = 4

    def __post_init__(self) -> None:
        for name in ("num_features", "grid_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"backbone.{name}", fix="give at least 1")
        if self.patch_size % 2 == 0:
            raise ConfigError(f"patch_size is {self.patch_size}", where="backbone.patch_size", fix="give an odd number")
        if not 0 < self.bandwidth < float("inf"):
            raise ConfigError(f"bandwidth is {self.bandwidth}", where="backbone.bandwidth", fix="give a number above 0")

    def message(self, job: Job) -> Payload:
        """What the server tells clients, so that all use the same features: the kind, and a seed.

        Args:
            job: the common model and the server's random source.

        Returns:
            ``backbone/kind`` and ``backbone/seed``.

        Raises:
            ConfigError: clients with different models cannot have their features in common, or the inputs are no
                images.
        """
        kind = self.kind
        is_image = len(job.model.input_shape) == 3
        if kind == "auto":
            has_weights = bool(job.model.initial) or is_foundation(job.model)
            is_pretrained = has_weights and not job.client_models
            kind = "model" if is_pretrained else "patches" if is_image else "relu"
        if kind == "model" and job.client_models:
            raise ConfigError(
                "clients with different models have no features in common",
                where="method.backbone.kind",
                fix="use kind: auto, patches, relu, fourier or pixels",
            )
        if kind == "patches" and not is_image:
            raise ConfigError(
                f"patches are cut from images, not from inputs of shape {job.model.input_shape}",
                where="method.backbone.kind",
                fix="use kind: relu or fourier",
            )
        job.facts["backbone"] = kind
        return Payload({"backbone/kind": kind, "backbone/seed": derive_seed(job.rng.seed, "backbone")})

    def build(self, spec: ModelSpec, message: Payload) -> FrozenFeatures:
        """The features, at the server or at a client.

        Args:
            spec: the model that is owned there.
            message: what :meth:`message` gave.
        """
        kind = message.text("backbone/kind")
        if kind == "model" and is_foundation(spec):
            return FrozenFeatures.of_foundation(spec)
        if kind == "model":
            return FrozenFeatures.of(cut_spec(spec, 1).copy(), spec)
        seed = message["backbone/seed"]
        assert isinstance(seed, int)
        module = RandomFeatures(
            kind,
            input_shape=spec.input_shape,
            num_features=self.num_features,
            seed=seed,
            bandwidth=self.bandwidth,
            patch_size=self.patch_size,
            grid_size=self.grid_size,
        )
        return FrozenFeatures(module, module.recipe, module.width)


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Methods whose one exchange asks every client for a summary of frozen features of its data.

    What a client uploads depends on that client alone, so clients can be added and removed one by one, exactly.

    Args:
        backbone: the features.
    """

    is_additive: ClassVar[bool] = True

    backbone: Backbone = field(default_factory=Backbone)

    def features_at(self, client: Client, msg: Payload) -> Tensor:
        """The features of a client's training examples.

        Args:
            client: whose.
            msg: what :meth:`Backbone.message` gave.

        Returns:
            Shape ``(n, width)``, float32, on the CPU.
        """
        return predict(self.backbone.build(client.model, msg).module, client.data.train.x, device=client.device)


@dataclass(frozen=True, kw_only=True)
class HeadTraining(LocalSGD):
    """How the server trains a linear head; the settings of local training with other defaults.

    Args:
        num_epochs: passes over the features, at least 1.
    """

    num_epochs: int = 50


def trained_head(features: Tensor, labels: Tensor, num_classes: int, settings: LocalSGD, job: Job) -> nn.Linear:
    """Train a linear head on the server, on features of one scale.

    Features are brought to mean 0 and deviation 1 for the training, and the head is written for them as they were, so
    that one learning rate fits every backbone.

    Args:
        features: shape ``(n, d)``.
        labels: shape ``(n,)``.
        num_classes: number of classes; those without a label get a bias that never wins.
        settings: how.
        job: random source, device and progress.
    """
    means, deviations = features.mean(0), features.std(0, correction=0)
    deviations = torch.where(deviations > 1e-6 * deviations.max().clamp(min=1e-12), deviations, torch.inf)
    d = features.shape[1]
    head = linear(torch.zeros(num_classes, d), torch.zeros(num_classes))
    train(
        head,
        Examples((features - means) / deviations, labels),
        settings,
        rng=job.rng.child("head"),
        device=job.device,
        progress=lambda done, total: job.progress("training the head", done, total),
    )
    weights = head.weight.detach().double() / deviations.double()
    biases = head.bias.detach().double() - weights @ means.double()
    is_seen = torch.bincount(labels, minlength=num_classes) > 0
    lowest = torch.finfo(torch.float32).min / 4
    return linear(weights * is_seen[:, None], torch.where(is_seen, biases, torch.full_like(biases, lowest)))
