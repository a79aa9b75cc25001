"""Choose what is worth sending of a client's images, disguise it, and make it say what the originals say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.examples import Examples, InputSpace
from fedfuse.ops.spectrum import cut_boxes, mix_amplitudes, random_boxes
from fedfuse.training.distillation import check_loss
from fedfuse.training.evaluation import predict

_BATCH_SIZE = 256


class Coder(Protocol):
    """An autoencoder of raw images."""

    def encode(self, x: Tensor) -> Tensor:
        """Raw images to latent values.

        Args:
            x: shape ``(n, *input_shape)``.
        """
        ...

    def decode(self, code: Tensor) -> Tensor:
        """Latent values to raw images.

        Args:
            code: what :meth:`encode` gives.
        """
        ...


class PixelCoder(nn.Module):
    """No autoencoder: the latent values are the pixels themselves."""

    def encode(self, x: Tensor) -> Tensor:
        """Give pixels back.

        Args:
            x: of any shape.
        """
        return x

    def decode(self, code: Tensor) -> Tensor:
        """Give pixels back.

        Args:
            code: of any shape.
        """
        return code


@dataclass(frozen=True)
class Crops:
    """The part of each image that a model finds easiest.

    Args:
        images: raw, shape ``(n, channels, height, width)``.
        labels: shape ``(n,)``.
        losses: cross-entropy of each under the model, shape ``(n,)``.
    """

    images: Tensor
    labels: Tensor
    losses: Tensor


def easiest_crops(
    model: nn.Module,
    raw: Examples,
    inputs: InputSpace,
    *,
    num_crops: int,
    smallest_area: float,
    draw: torch.Generator,
    device: torch.device,
) -> Crops:
    """Of several random crops of each image, the one with the lowest cross-entropy.

    That is the one with the most usable information on its label, for a fixed model and a fixed prior of labels.

    Args:
        model: takes normalised images.
        raw: images and labels.
        inputs: how they are normalised.
        num_crops: crops of each image, at least 1.
        smallest_area: least part of an image that a crop keeps; 1 keeps the whole image.
        draw: decides the crops.
        device: where the model computes.

    Returns:
        One crop per image, in the order of the images.
    """
    best, lowest = raw.x.clone(), torch.full((len(raw),), torch.inf)
    for _ in range(num_crops):
        crops = cut_boxes(raw.x, random_boxes(len(raw), smallest_area, draw)) if smallest_area < 1 else raw.x
        logits = predict(model, inputs.normalize(crops), device=device)
        losses = F.cross_entropy(logits, raw.y, reduction="none")
        is_better = losses < lowest
        best[is_better], lowest = crops[is_better], torch.minimum(losses, lowest)
    return Crops(best, raw.y, lowest)


def choose(crops: Crops, images_per_class: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """The easiest images of each class, and for each a partner to be mixed with.

    Partners are the hardest images of the same class that were not chosen. Where all were chosen they are the hardest
    others of the class; where the class has one image only, the hardest of other classes.

    Args:
        crops: a client's images.
        images_per_class: how many of each class at most, at least 1.
        num_classes: number of classes.

    Returns:
        Positions of the chosen images, class by class and easiest first, and of their partners, both of shape ``(n,)``;
        a partner is -1 where there is no other image at all.
    """
    chosen, partners = [], []
    order = torch.argsort(crops.losses, stable=True)
    hardest = order.flip(0)
    for label in range(num_classes):
        own = order[crops.labels[order] == label]
        picked, rest = own[:images_per_class], own[images_per_class:].flip(0)
        for number, position in enumerate(picked.tolist()):
            pool = rest if len(rest) else picked.flip(0)[picked.flip(0) != position]
            if len(pool) == 0:
                pool = hardest[hardest != position]
            chosen.append(position)
            partners.append(int(pool[number % len(pool)]) if len(pool) else -1)
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(partners, dtype=torch.int64)


def disguise(images: Tensor, others: Tensor, weight: float, *, is_pixels: bool) -> Tensor:
    """Mix amplitudes and bring pixels back into their range.

    Args:
        images: raw, shape ``(n, channels, height, width)``.
        others: of the same shape.
        weight: of the others' amplitudes.
        is_pixels: whether values stay in [0, 1].

    Returns:
        The same shape.
    """
    mixed = mix_amplitudes(images, others, weight)
    return mixed.clamp(0, 1) if is_pixels else mixed


def distil_images(
    model: nn.Module,
    coder: Coder,
    start: Tensor,
    wanted: Examples,
    inputs: InputSpace,
    *,
    num_steps: int,
    learning_rate: float,
    label_weight: float,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Change latent values until a model sees in the decoded images what it sees in the wanted ones.

    Args:
        model: takes normalised images; what enters its last linear layer are its features.
        coder: between latent values and raw images.
        start: raw images whose codes are the start.
        wanted: raw images whose features are wanted, and their labels.
        inputs: how images are normalised.
        num_steps: of AdamW with a cosine schedule; 0 only encodes.
        learning_rate: of AdamW.
        label_weight: of the cross-entropy of the labels beside the distance of the features.
        device: where.
        progress: called with (steps done, steps in all).

    Returns:
        The latent values on the CPU.
    """
    model = model.to(device).eval().requires_grad_(False)
    if isinstance(coder, nn.Module):
        coder.to(device)
    parts = torch.arange(len(start)).split(_BATCH_SIZE)
    total = num_steps * len(parts)
    codes = []
    for number, part in enumerate(parts):
        codes.append(
            _distilled(
                model,
                coder,
                start[part].to(device),
                Examples(wanted.x[part].to(device), wanted.y[part].to(device)),
                inputs,
                num_steps,
                learning_rate,
                label_weight,
                lambda step, number=number: progress(number * num_steps + step, total),  # type: ignore[misc]
            )
        )
    if isinstance(coder, nn.Module):
        coder.cpu()
    return torch.cat(codes)


def _distilled(
    model: nn.Module,
    coder: Coder,
    start: Tensor,
    wanted: Examples,
    inputs: InputSpace,
    num_steps: int,
    learning_rate: float,
    label_weight: float,
    tell: Callable[[int], None],
) -> Tensor:
    with torch.no_grad(), features_seen(model) as seen:
        code = coder.encode(start).clone()
        model(inputs.normalize(wanted.x))
        target = seen.pop()
    code.requires_grad_()
    optimizer = torch.optim.AdamW([code], lr=learning_rate, betas=(0.5, 0.9), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    with features_seen(model) as seen:
        for step in range(num_steps):
            images = coder.decode(code)
            logits = model(inputs.normalize(images.clamp(0, 1) if inputs.is_pixels else images)).float()
            # A sum over images, so that the path of one does not depend on those beside it.
            loss = (seen.pop() - target).square().mean(1).sum()
            if label_weight:
                loss = loss + label_weight * F.cross_entropy(logits, wanted.y, reduction="sum")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            tell(step + 1)
    if num_steps:
        check_loss(float(loss.detach()), "method")
    return code.detach().cpu()


@contextmanager
def features_seen(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what enters the last linear layer of a model, or its output where it has none.

    Args:
        model: as its code lists its layers.

    Yields:
        A list that grows by one tensor of shape ``(n, d)`` with each pass.
    """
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if layers:
        handle = layers[-1].register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(1).float()))
    else:
        handle = model.register_forward_hook(lambda module, given, out: seen.append(out.flatten(1).float()))
    try:
        yield seen
    finally:
        handle.remove()
