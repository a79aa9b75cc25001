"""What a module says of itself where it is no plain classifier, and what judging a model gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng


@dataclass(frozen=True)
class Sheet:
    """Drawings of a model, a line for each class.

    Args:
        drawings: in [0, 1], shape ``(num_lines, num_columns, channels, height, width)``.
        classes: number of the class of each line.
    """

    drawings: Tensor
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on some examples.

    Args:
        accuracy: fraction of right predictions, in [0, 1]: of classes, or of the tokens that a language model was to
            write, or of generated pictures that show what was asked for.
        loss: mean of the loss that it was trained with: cross-entropy per example or per token, or squared error.
        confusion: counts, shape ``(num_classes, num_classes)``; rows are the true classes. ``None`` where it does not
            predict classes.
        metrics: further scores by name.
        pictures: sheets of drawings by name, to be shown in the report.
    """

    accuracy: float
    loss: float
    confusion: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Sheet] = field(default_factory=dict)


@runtime_checkable
class HasObjective(Protocol):
    """A module that knows what it learns; others learn classes by cross-entropy."""

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            x: inputs, shape ``(n, *input_shape)``.
            y: labels, shape ``(n,)``.

        Returns:
            A scalar, the mean over the batch.
        """
        ...


@runtime_checkable
class JudgesItself(Protocol):
    """A module that knows how it is judged; others are judged by the classes that they predict."""

    def judge(self, examples: Examples, *, device: torch.device | str = "cpu") -> Evaluation:
        """How good it is.

        Args:
            examples: at least one.
            device: where.
        """
        ...


@runtime_checkable
class Generates(Protocol):
    """A module that writes text.

    ``tokenizer`` is the name of what turns its tokens into text, empty where that is not known; ``num_generated`` says
    how many answers are written when it is judged.
    """

    tokenizer: str
    num_generated: int

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt with the likeliest token, again and again.

        Args:
            prompts: token ids.
            max_new_tokens: most tokens to add.

        Returns:
            The added tokens of each prompt, up to and without the end token.
        """
        ...


@runtime_checkable
class Draws(Protocol):
    """A module that draws pictures.

    ``num_drawn`` says how many are drawn when it is judged; ``judge_path`` is the folder of a classifier that scores
    them, empty where there is none.
    """

    judge_path: str
    num_drawn: int

    def draw(self, x: Tensor, rng: Rng) -> Tensor:
        """Draw a picture for each of some inputs.

        Args:
            x: inputs; their own pictures are not looked at.
            rng: decides what is drawn.

        Returns:
            Shape ``(n, channels, height, width)``, in [0, 1].
        """
        ...

    def pictures_of(self, x: Tensor) -> Tensor:
        """The pictures that inputs hold.

        Args:
            x: inputs.

        Returns:
            Shape ``(n, channels, height, width)``, in [0, 1].
        """
        ...
