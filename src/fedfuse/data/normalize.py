"""Normalisation of inputs by one mean and one standard deviation per channel or feature.

In a real federation every client must use the same numbers: set them, or use those that are known for the data.
Measuring them (``auto`` on unknown data) needs all training data in one place, which only a simulation has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from fedfuse.data.dataset import Dataset


@dataclass(frozen=True)
class Normalization:
    """Subtract a mean and divide by a standard deviation, along dimension 1.

    Args:
        mean: one number per channel or feature; empty leaves inputs as they are.
        std: as many numbers, above 0.

    Raises:
        ConfigError: the two differ in length, or a number cannot be used.

    Example:
        >>> Normalization((0.5,), (0.25,)).apply(torch.ones(1, 1)).item()
        2.0
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f"mean has {len(self.mean)} numbers and std has {len(self.std)}",
                where="normalize",
                fix="give one of each per channel or feature",
            )
        if not all(math.isfinite(value) for value in self.mean):
            raise ConfigError("a mean is not finite", where="normalize.mean", fix="give finite numbers")
        if not all(value > 0 and math.isfinite(value) for value in self.std):
            raise ConfigError(
                "a standard deviation is not above 0",
                where="normalize.std",
                fix="give positive numbers; 1 leaves the scale as it is",
            )

    def check(self, num_channels: int) -> None:
        """Refuse inputs with another number of channels or features.

        Args:
            num_channels: size of dimension 1 of the inputs.

        Raises:
            DataError: the numbers do not fit.
        """
        if self.mean and len(self.mean) != num_channels:
            raise DataError(
                f"the normalisation has {len(self.mean)} numbers, "
                f"and the inputs have {num_channels} channels or features",
                where="normalize",
                fix='give one mean and one std per channel or feature, or "auto"',
            )

    def apply(self, x: Tensor) -> Tensor:
        """Normalise inputs.

        Args:
            x: shape ``(n, channels, ...)``; left as it is.

        Returns:
            The same shape.

        Raises:
            DataError: the number of channels does not fit.
        """
        if not self.mean:
            return x
        self.check(x.shape[1])
        shape = (1, len(self.mean)) + (1,) * (x.dim() - 2)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(shape)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(shape)
        return (x - mean).div_(std)


KNOWN: Mapping[str, Normalization] = {
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion_mnist": Normalization((0.2860,), (0.3530,)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": Normalization((0.3051,), (0.3760,)),
}
"""Constants of well-known training parts, for pixels in [0, 1]."""

_OTHER_SPELLINGS = {
    "fashionmnist": "fashion_mnist",
    "fmnist": "fashion_mnist",
    "cifar_10": "cifar10",
    "cifar_100": "cifar100",
}


def known_normalization(name: str) -> Normalization | None:
    """The constants of a well-known data set.

    Args:
        name: of the data set, in any usual spelling.

    Returns:
        ``None`` if it is not in the table.
    """
    plain = name.lower().replace("-", "_")
    return KNOWN.get(_OTHER_SPELLINGS.get(plain, plain))


def measured_normalization(x: Tensor) -> Normalization:
    """Mean and population standard deviation per channel or feature.

    Args:
        x: shape ``(n, channels, ...)``, with at least one example.

    Returns:
        In double precision; a constant channel keeps its scale (standard deviation 1).
    """
    # One channel at a time: a double precision copy of all inputs would need twice their memory.
    means, stds = [], []
    for channel in range(x.shape[1]):
        values = x[:, channel].double()
        means.append(float(values.mean()))
        std = float(values.std(correction=0))
        stds.append(std if std > 1e-8 * max(1.0, abs(means[-1])) else 1.0)
    return Normalization(tuple(means), tuple(stds))


def resolve_normalization(
    setting: str | Normalization | Mapping[str, Sequence[float]], dataset: Dataset
) -> Normalization:
    """Turn the setting ``normalize`` into numbers.

    Args:
        setting: ``auto`` (known constants where the data set's name is known, else measured on its training part; the
            latter needs all data in one place; codes are left alone), ``none``, the name of a well-known data set, a
            table with lists ``mean`` and ``std``, or the numbers themselves.
        dataset: what is normalised.

    Returns:
        Numbers that fit the data.

    Raises:
        ConfigError: the setting cannot be used.
        DataError: its numbers do not fit the data.
    """
    num_channels = dataset.input_shape[0]
    if isinstance(setting, Normalization):
        chosen = setting
    elif isinstance(setting, Mapping):
        if set(setting) != {"mean", "std"}:
            raise ConfigError(
                f"normalize has the keys {', '.join(sorted(setting)) or 'none'}",
                where="normalize",
                fix="give it mean and std, one list of numbers each",
            )
        chosen = Normalization(tuple(float(v) for v in setting["mean"]), tuple(float(v) for v in setting["std"]))
    elif setting == "none" or (setting == "auto" and dataset.is_coded):
        chosen = Normalization()
    elif setting == "auto":
        known = known_normalization(dataset.name) if dataset.is_image else None
        chosen = (
            known if known is not None and len(known.mean) == num_channels else measured_normalization(dataset.train.x)
        )
    else:
        named = known_normalization(setting)
        if named is None:
            raise ConfigError(
                f'there is no normalisation "{setting}"',
                where="normalize",
                fix=did_you_mean(setting, ["auto", "none", *KNOWN]),
            )
        chosen = named
    chosen.check(num_channels)
    return chosen
