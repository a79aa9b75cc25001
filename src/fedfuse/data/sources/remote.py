"""Data that stay with their owners: only what they look like is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.registry import register_source
from fedfuse.data.dataset import Dataset


@register_source("remote")
@dataclass(frozen=True, kw_only=True)
class Remote:
    """Examples that stay with their owners in a real federation; says what they look like.

    Nothing can be measured on data that nobody sees at once, so inputs are normalised by the numbers under
    ``data.normalize``; ``auto`` takes 0.5 and 0.5 for images with values in [0, 1], and leaves tables as they are.

    Args:
        input_shape: shape of one input, without the batch dimension: ``[channels, height, width]`` or
            ``[num_features]``.
        class_names: name of each class, in the order of the model's outputs.
        is_pixels: whether inputs are images with values in [0, 1].
        test: ``source`` and settings of test data that the server has; for the report only.

    Raises:
        ConfigError: the shape or the names cannot be used.
    """

    input_shape: list[int]
    class_names: list[str]
    is_pixels: bool = False
    test: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.input_shape or any(size < 1 for size in self.input_shape):
            raise ConfigError(
                f"no input has the shape {self.input_shape}",
                where="data.input_shape",
                fix="write [channels, height, width] for images, or [num_features]",
            )
        # One is enough for texts that are of one kind.
        if len(set(self.class_names)) != len(self.class_names) or not self.class_names:
            raise ConfigError(
                "the names of the classes are missing, or one stands twice",
                where="data.class_names",
                fix="name each class once, in the order of the model's outputs",
            )

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """There is nothing to read.

        Args:
            limit: not used.
            test_limit: not used.

        Raises:
            DataError: always.
        """
        raise DataError(
            "the data of this federation stay with their owners, nothing can be simulated",
            where="data.source",
            fix="run it for real: fedfuse serve, or fedfuse contribute and fedfuse fuse",
        )
