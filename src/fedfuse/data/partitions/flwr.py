"""Any partitioner of flwr-datasets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedfuse.core.errors import ConfigError, DataError, FedfuseError, did_you_mean
from fedfuse.core.registry import register_partition
from fedfuse.data.checks import optional_module
from fedfuse.data.partitions.assignment import named

_POSITION = "fedfuse_position"


@register_partition("flwr")
@dataclass(frozen=True, kw_only=True)
class Flwr:
    """A partitioner of flwr-datasets, by the name of its class.

    It sees the labels as the column ``label``, and the data's other columns under their names. Unless set, it splits
    by ``label``, and its seed is derived from the run's. Whether all examples are used is up to it.

    Args:
        partitioner: name of a class of ``flwr_datasets.partitioner``, such as ``PathologicalPartitioner``.
        settings: what the class is made with, such as ``num_partitions``.
    """

    partitioner: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def assign(
        self, labels: np.ndarray, num_classes: int, rng: np.random.Generator, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Say who gets which examples.

        Args:
            labels: class of each training example, shape ``(n,)``.
            num_classes: number of classes.
            rng: where the partitioner's seed is drawn from.
            columns: further columns that it may split by.

        Returns:
            Sorted positions by client id; clients are numbered as the partitioner numbers its parts.

        Raises:
            ConfigError: there is no such partitioner, or it does not take these settings.
            DataError: flwr-datasets is not installed, or the partitioner fails.
        """
        module = optional_module("flwr_datasets.partitioner", package="flwr-datasets", extra="partitions")
        datasets = optional_module("datasets", package="datasets", extra="data")
        partitioner = self._build(module, seed=int(rng.integers(2**31)))
        facts = {name: np.asarray(column) for name, column in columns.items() if name not in ("label", _POSITION)}
        table = {**facts, "label": labels, _POSITION: np.arange(len(labels))}
        try:
            partitioner.dataset = datasets.Dataset.from_dict(table)
            pieces = [
                np.asarray(partitioner.load_partition(part)[_POSITION], dtype=np.int64)
                for part in range(partitioner.num_partitions)
            ]
        except FedfuseError:
            raise
        except Exception as error:  # another package's code; what it raises is its own affair
            raise DataError(
                f"{self.partitioner} failed: {_first_line(error)}",
                where="partition",
                fix="check its settings in the flwr-datasets reference",
            ) from error
        return named(pieces)

    def _build(self, module: Any, seed: int) -> Any:
        names = [name for name in dir(module) if name.endswith("Partitioner") and name != "Partitioner"]
        if self.partitioner not in names:
            raise ConfigError(
                f'flwr-datasets has no partitioner "{self.partitioner}"',
                where="partition.partitioner",
                fix=did_you_mean(self.partitioner, names),
            )
        kind = getattr(module, self.partitioner)
        known = inspect.signature(kind).parameters
        settings = dict(self.settings)
        for name, value in (("partition_by", "label"), ("seed", seed)):
            if name in known:
                settings.setdefault(name, value)
        unknown = next((name for name in settings if name not in known), None)
        if unknown is not None:
            raise ConfigError(
                f'{self.partitioner} has no setting "{unknown}"',
                where="partition.settings",
                fix=did_you_mean(unknown, known),
            )
        try:
            return kind(**settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.partitioner} refuses its settings: {_first_line(error)}",
                where="partition.settings",
                fix="check them in the flwr-datasets reference",
            ) from None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
