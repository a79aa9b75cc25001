"""Data sets of the Hugging Face hub, or folders in one of its layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.core.errors import ConfigError, DataError, FedfuseError, did_you_mean
from fedfuse.core.registry import register_source
from fedfuse.data.arrow import ArrowSettings
from fedfuse.data.checks import optional_module
from fedfuse.data.dataset import Dataset


@register_source("huggingface")
@dataclass(frozen=True, kw_only=True)
class HuggingFace(ArrowSettings):
    """A data set of the Hugging Face hub, or a folder that ``datasets`` reads.

    Images are decoded once; their pixels are kept in the cache folder. No code of a data set is run.

    Args:
        name: id on the hub, such as ``ylecun/mnist``, or a local folder, also one of ``save_to_disk``.
        subset: name of the subset (the hub's ``config``), where there are several.
        revision: branch, tag or commit on the hub.
        train_split: name of the training part.
        test_split: name of the test part; empty for none.
    """

    name: str
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Download or read the data.

        Args:
            limit: first training rows only; only these are decoded.
            test_limit: first test rows only.

        Returns:
            Images or a table.

        Raises:
            ConfigError: a split or a column that was set is not there, or none can be found.
            DataError: the data cannot be reached, or its content cannot be used.
        """
        train, test = self.parts()
        return self.dataset(train, test, Path(self.name).name, limit, test_limit)

    def parts(self) -> tuple[HuggingFacePart, HuggingFacePart | None]:
        """Open the data, before anything is read of it.

        Returns:
            The training part and the test part, where there is one.

        Raises:
            ConfigError: there is no such split.
            DataError: the data cannot be reached.
        """
        splits = self._splits()
        for setting, split in (("train_split", self.train_split), ("test_split", self.test_split)):
            is_default_test = setting == "test_split" and split == "test" and self.test_fraction
            if split and split not in splits and not is_default_test:
                fix = did_you_mean(split, splits) + (
                    "; for none, set test_split to an empty text" if setting == "test_split" else ""
                )
                raise ConfigError(f'{setting}: there is no split "{split}"', where=self.name, fix=fix)
        test = splits.get(self.test_split) if self.test_split else None
        train_part = HuggingFacePart(splits[self.train_split], f"{self.name}, {self.train_split}")
        return train_part, None if test is None else HuggingFacePart(test, f"{self.name}, {self.test_split}")

    def _splits(self) -> Mapping[str, Any]:
        datasets = optional_module("datasets", package="datasets", extra="data")
        folder = Path(self.name).expanduser()
        try:
            if (folder / "dataset_dict.json").exists():
                return dict(datasets.load_from_disk(str(folder)))
            if (folder / "state.json").exists():
                return {self.train_split: datasets.load_from_disk(str(folder))}
            return dict(
                datasets.load_dataset(
                    str(folder) if folder.is_dir() else self.name, self.subset, revision=self.revision
                )
            )
        except FedfuseError:
            raise
        except Exception as error:  # the hub's client raises many kinds, none of which names what a reader can do
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise DataError(
                f"the data set cannot be loaded: {reason:.200}",
                where=self.name,
                fix="check the id, the subset and the network; without a network name a local folder",
            ) from error


@dataclass(frozen=True)
class HuggingFacePart:
    """A ``datasets.Dataset`` as one part.

    Args:
        data: the ``datasets.Dataset``.
        where: what error messages call it.
    """

    data: Any
    where: str

    @property
    def names(self) -> list[str]:
        """All columns."""
        return list(self.data.column_names)

    @property
    def features(self) -> Mapping[str, Any]:
        """Hugging Face features by column, as JSON."""
        return self.data.features.to_dict()  # type: ignore[no-any-return]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.data)

    @property
    def digest(self) -> str:
        """Names the content, for the cache."""
        return f"huggingface {self.data._fingerprint}"

    def read(self, columns: list[str], limit: int | None) -> Any:
        """A pyarrow table of the first rows; images stay encoded.

        Args:
            columns: which.
            limit: how many rows; ``None`` means all.

        Returns:
            The table.
        """
        count = len(self.data) if limit is None else min(limit, len(self.data))
        return self.data.select_columns(columns).with_format("arrow")[:count]
