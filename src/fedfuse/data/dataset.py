"""A labelled data set in memory, before it is split over clients."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedfuse.core.errors import DataError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.checks import check_fraction, check_limit
from fedfuse.data.splitting import stratified_split


@dataclass(frozen=True)
class Dataset:
    """Training and test examples with what is known about them.

    Args:
        train: what is split over clients; images are float32 in [0, 1] of shape ``(n, channels, height, width)``,
            tables float32 of shape ``(n, num_features)``; labels are 0 .. num_classes - 1.
        test: held by the server for the report only; ``None`` where there is none.
        class_names: name of each class, in label order.
        columns: further facts about each training example, by name, shape ``(len(train),)``; natural clients are
            made from them.
        is_image: whether the inputs are images.
        is_coded: whether the inputs are codes, such as the tokens of a text, whose scale must stay as it is.
        name: short name; known normalisation constants are found by it.

    Raises:
        DataError: the parts do not fit together.
    """

    train: Examples
    test: Examples | None
    class_names: tuple[str, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    is_image: bool = False
    is_coded: bool = False
    name: str = "data"

    def __post_init__(self) -> None:
        for part, examples in (("training", self.train), ("test", self.test)):
            if examples is None:
                continue
            if len(examples) == 0:
                raise DataError(f"the {part} part is empty", where=self.name, fix="give it at least one example")
            if examples.x.dim() < 2:
                raise DataError(
                    f"the {part} inputs have shape {tuple(examples.x.shape)}",
                    where=self.name,
                    fix="give each example at least one feature: shape (num_examples, num_features)",
                )
            low, high = int(examples.y.min()), int(examples.y.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"the {part} labels go from {low} to {high}, but there are {self.num_classes} classes",
                    where=self.name,
                    fix="give every class a name, and labels 0 .. num_classes - 1",
                )
        if self.test is not None and self.test.x.shape[1:] != self.train.x.shape[1:]:
            raise DataError(
                f"training inputs have shape {self.input_shape} and test inputs {tuple(self.test.x.shape[1:])}",
                where=self.name,
                fix="bring both to one shape; sources of images have the setting size",
            )
        for name, column in self.columns.items():
            if len(column) != len(self.train):
                raise DataError(
                    f'the column "{name}" has {len(column)} values for {len(self.train)} training examples',
                    where=self.name,
                )

    @property
    def num_classes(self) -> int:
        """Number of classes, whether examples of all of them are there or not."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    def limited(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """The first rows only.

        Args:
            limit: training rows, at least 1; ``None`` means all.
            test_limit: test rows, at least 1; ``None`` means all.

        Returns:
            A data set with the same classes.

        Raises:
            ConfigError: a limit is below 1.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        test = self.test
        return dataclasses.replace(
            self,
            train=Examples(self.train.x[:limit], self.train.y[:limit]),
            test=None if test is None else Examples(test.x[:test_limit], test.y[:test_limit]),
            columns={name: column[:limit] for name, column in self.columns.items()},
        )

    def with_test_part(self, test_fraction: float) -> Dataset:
        """Split a test part off the training part where there is none.

        The split is stratified and always the same: it does not depend on a run's seed.

        Args:
            test_fraction: share of the training examples, in [0, 1); 0 leaves the data without a test part and warns.

        Returns:
            The data set itself if it has a test part.

        Raises:
            ConfigError: the fraction is outside [0, 1).
        """
        check_fraction("source.test_fraction", test_fraction)
        if self.test is not None:
            return self
        labels = self.train.y.numpy()
        kept, held = stratified_split(labels, test_fraction, Rng(0).numpy("test part"))
        if len(held) == 0:
            warnings.warn(
                f"{self.name} has no test part, so no test accuracy can be reported; "
                "set test_fraction to split one off",
                stacklevel=2,
            )
            return self
        return dataclasses.replace(
            self,
            train=self.train.subset(kept),
            test=self.train.subset(held),
            columns={name: column[kept] for name, column in self.columns.items()},
        )


class Source(Protocol):
    """A way to read data: a frozen dataclass of settings with one method."""

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: the first training rows only; the same rows as ``load().limited(limit)``, but cheaper.
            test_limit: the first test rows only.
        """
        ...
