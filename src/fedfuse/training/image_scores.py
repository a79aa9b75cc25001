"""How good drawn pictures are: what a classifier says of them, and how far its features are from those of real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import load
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.examples import Examples
from fedfuse.core.judging import Draws, Evaluation, Sheet
from fedfuse.core.seeding import Rng
from fedfuse.ops.frechet import frechet_distance

MOST_COLUMNS = 8
"""Most drawings in a line of a sheet."""

MOST_LINES = 20
"""Most lines of a sheet."""

_AT_ONCE = 500


def with_drawings(
    module: Draws, seen: Evaluation, examples: Examples, *, device: torch.device | str = "cpu"
) -> Evaluation:
    """Let a model draw by captions of some examples, and add what the drawings score.

    Captions and the first noise of each drawing are the same for every model.

    Args:
        module: draws, and names its judge.
        seen: what it scores otherwise.
        examples: with captions, classes and real pictures.
        device: where the module is.

    Returns:
        With a judge, ``accuracy`` is the share of drawings that it recognises as the class of their caption, and the
        metrics hold :func:`image_scores`; always a sheet of drawings, where there is any.
    """
    num_drawn = min(module.num_drawn, len(examples))
    if not num_drawn:
        return seen
    # Not every so-manieth: classes may come in turn.
    rows = _shuffled(len(examples))[:num_drawn].sort().values
    drawings = module.draw(examples.x[rows].to(device), Rng(0).child("drawings")).float().cpu()
    classes = examples.y[rows]
    seen = replace(seen, pictures={**seen.pictures, "drawings": sheet(drawings, classes)})
    if not module.judge_path:
        return seen
    scores = image_scores(
        open_judge(module.judge_path), drawings, classes, module.pictures_of(examples.x), device=device
    )
    return replace(seen, accuracy=scores["recognised"], metrics={**seen.metrics, **scores})


def image_scores(
    judge: nn.Module, drawings: Tensor, classes: Tensor, real: Tensor, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Score drawings by a classifier that knows real pictures.

    Args:
        judge: takes pictures in [0, 1]; trained on other pictures than ``real``.
        drawings: in [0, 1], shape ``(n, channels, height, width)``.
        classes: what each was to show, shape ``(n,)``.
        real: real pictures of the same kind, same shape but for their number.
        device: where.

    Returns:
        ``recognised``, the share of drawings that the judge takes for what they were to show; ``feature_distance``,
        the squared Frechet distance (:func:`fedfuse.ops.frechet.frechet_distance`) of the judge's last features
        between drawings and real pictures, where there are two of each; and ``feature_distance_real``, the same
        between two halves of the real pictures, where there are four: what chance alone gives.

    Raises:
        ConfigError: the judge does not take such pictures.
    """
    logits, features = features_of(judge, drawings, device=device)
    found = {"recognised": (logits.argmax(1) == classes).double().mean().item()}
    _, wanted = features_of(judge, real, device=device)
    if min(len(features), len(wanted)) > 1:
        found["feature_distance"] = frechet_distance(features, wanted)
    if len(wanted) > 3:
        first, second = wanted[_shuffled(len(wanted))].chunk(2)
        found["feature_distance_real"] = frechet_distance(first, second)
    return found


def open_judge(path: str) -> nn.Module:
    """The classifier of a run or an artifact.

    Args:
        path: its folder.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    try:
        judge = load(path)
    except FedfuseError as error:
        raise ConfigError(
            f"the judge cannot be used: {error.what}",
            where=f"model.judge: {path}",
            fix="name the folder of a run that trained a classifier of such pictures",
        ) from None
    return judge


def features_of(judge: nn.Module, pictures: Tensor, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """What a classifier says of pictures, and what its last linear layer sees.

    Args:
        judge: takes pictures in [0, 1].
        pictures: shape ``(n, channels, height, width)``.
        device: where.

    Returns:
        Logits, shape ``(n, num_classes)``, and features, shape ``(n, width)``, on the CPU.

    Raises:
        ConfigError: it has no linear layer, or does not take such pictures.
    """
    layers = [module for module in judge.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError("the judge has no linear layer", where="model.judge", fix="use a plain classifier")
    seen: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach().float().cpu())

    judge.to(device).eval()
    hook = layers[-1].register_forward_pre_hook(remember)
    try:
        with torch.no_grad():
            logits = torch.cat([judge(part.to(device)).float().cpu() for part in pictures.split(_AT_ONCE)])
    except RuntimeError:
        raise ConfigError(
            f"the judge does not take pictures of {' x '.join(map(str, pictures.shape[1:]))}",
            where="model.judge",
            fix="train it on pictures of the same size and channels",
        ) from None
    finally:
        hook.remove()
    return logits, torch.cat(seen).flatten(1)


def sheet(drawings: Tensor, classes: Tensor) -> Sheet:
    """Some drawings of each class, a line for each.

    Args:
        drawings: shape ``(n, channels, height, width)``, at least one.
        classes: shape ``(n,)``.

    Returns:
        Up to 20 classes that are there, in order, and as many of each as the rarest of them has, up to 8.
    """
    there = classes.unique().tolist()[:MOST_LINES]
    num_columns = min([MOST_COLUMNS, *(int((classes == label).sum()) for label in there)])
    lines = [drawings[classes == label][:num_columns] for label in there]
    return Sheet(torch.stack(lines), tuple(there))


def _shuffled(num_rows: int) -> Tensor:
    return torch.randperm(num_rows, generator=Rng(0).torch("rows that are judged"))
