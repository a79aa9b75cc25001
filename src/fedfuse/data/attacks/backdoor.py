"""A patch that turns every input into one class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_attack
from fedfuse.core.seeding import Rng
from fedfuse.data.attacks.attack import Attack, Inputs


@register_attack("backdoor")
@dataclass(frozen=True, kw_only=True)
class Backdoor(Attack):
    """A hostile client stamps a patch onto some of its examples and labels them as one class (Gu et al., 2017).

    With ``factor`` above 1 it also enlarges what it learned, so that the mean of n clients is replaced by its own model
    for a factor of n (Bagdasaryan et al., AISTATS 2020). Its success is the share of stamped test inputs of other
    classes that are named as that class; with no hostile client it says how often that happens anyway.

    Args:
        target: label that stamped inputs get.
        fraction: part of its examples that it stamps, in (0, 1].
        size: side of the patch in pixels, in the lower right corner; or how many of the last features.
        value: of the patch, before normalisation; 1 is the brightest pixel.
        factor: what the difference to the weights that it was sent is multiplied by.
    """

    target: int = 0
    fraction: float = 0.5
    size: int = 2
    value: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ConfigError(f"target is {self.target}", where="attack.target", fix="give the number of a class")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}", where="attack.fraction", fix="give a fraction in (0, 1]")
        if self.size < 1:
            raise ConfigError(f"size is {self.size}", where="attack.size", fix="give at least 1")

    @property
    def forges_uploads(self) -> bool:
        """Whether what it learned is enlarged."""
        return self.factor != 1

    def stamped(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Inputs with the patch.

        Args:
            x: normalised, shape ``(n, channels, height, width)`` or ``(n, num_features)``; left as they are.
            inputs: tells what was applied to all inputs.

        Returns:
            The same shape.

        Raises:
            DataError: the inputs have another shape, or the patch does not fit.

        Example:
            >>> from fedfuse.data.normalize import Normalization
            >>> Backdoor(size=1).stamped(torch.zeros(1, 1, 2, 2), Inputs(2, Normalization((0.5,), (0.25,)))).tolist()
            [[[[0.0, 0.0], [0.0, 2.0]]]]
        """
        if x.dim() not in (2, 4) or min(x.shape[2:] or x.shape[1:]) < self.size:
            raise DataError(
                f"a patch of {self.size} does not fit onto inputs of shape {tuple(x.shape[1:])}",
                where="attack.size",
                fix="give images or rows of features, and a smaller size",
            )
        patch = inputs.normalization.apply(torch.full((1, *x.shape[1:]), self.value, dtype=x.dtype))
        mask = torch.zeros(x.shape[1:], dtype=torch.bool)
        if x.dim() == 2:
            mask[-self.size :] = True
        else:
            mask[:, -self.size :, -self.size :] = True
        return torch.where(mask, patch, x)

    def poison(self, examples: Examples, inputs: Inputs, rng: Rng) -> Examples:
        """Stamp and relabel some examples.

        Args:
            examples: the client's own.
            inputs: what it knows of the task.
            rng: says which.

        Raises:
            ConfigError: there is no such class.
        """
        self._check(inputs)
        order = torch.randperm(len(examples), generator=rng.torch("backdoor"))
        rows = order[: round(self.fraction * len(examples))].sort().values
        x, y = examples.x.clone(), examples.y.clone()
        if len(rows):
            x[rows] = self.stamped(x[rows], inputs)
        y[rows] = self.target
        return Examples(x, y)

    def forge(self, values: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """Enlarge what was learned.

        Args:
            values: what was learned on poisoned data.
            start: where it began.
            generator: not used.
        """
        return start + self.factor * (values - start)

    def wanted(self, test: Examples, inputs: Inputs) -> Examples:
        """Stamped inputs of other classes, all labelled as the target.

        Args:
            test: honest test examples.
            inputs: what the attacker knows of the task.

        Raises:
            ConfigError: there is no such class.
        """
        self._check(inputs)
        x = test.x[test.y != self.target]
        return Examples(self.stamped(x, inputs), torch.full((len(x),), self.target))

    def _check(self, inputs: Inputs) -> None:
        if self.target >= inputs.num_classes:
            raise ConfigError(
                f"there is no class {self.target}",
                where="attack.target",
                fix=f"classes are 0 to {inputs.num_classes - 1}",
            )
