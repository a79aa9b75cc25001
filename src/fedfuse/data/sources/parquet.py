"""Local Parquet files in the layout of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedfuse.core.registry import register_source
from fedfuse.data.arrow import ArrowSettings
from fedfuse.data.arrow_files import ParquetPart, files_at, find_files
from fedfuse.data.dataset import Dataset


@register_source("parquet")
@dataclass(frozen=True, kw_only=True)
class Parquet(ArrowSettings):
    """Parquet files: a folder with ``train-*.parquet`` and ``test-*.parquet``, or single files.

    The files may also lie in ``data/``, as on the Hugging Face hub; without a test part, the validation part is the
    test part. Images are decoded once; their pixels are kept in the cache folder. Without images, all columns of
    numbers are features.

    Args:
        path: the folder, or the file of the training part.
        test_path: the file or folder of the test part, where it is not found beside the training part.
        dataset_name: what to call the data; the last part of the path where not set.
    """

    path: str
    test_path: str | None = None
    dataset_name: str | None = None

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only; only these are decoded.
            test_limit: first test rows only.

        Returns:
            Images or a table.

        Raises:
            ConfigError: a column that was set is not there, or none can be found.
            DataError: there are no files, or their content cannot be used.
        """
        path = Path(self.path).expanduser()
        train_files, test_files = find_files(path)
        if self.test_path is not None:
            test_files = files_at(Path(self.test_path).expanduser())
        name = self.dataset_name or (path.stem if path.is_file() else path.resolve().name)
        test = ParquetPart(tuple(test_files)) if test_files else None
        return self.dataset(ParquetPart(tuple(train_files)), test, name, limit, test_limit)
