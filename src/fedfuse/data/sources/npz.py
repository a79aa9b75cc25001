"""NumPy archives."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.core.errors import ConfigError, DataError, did_you_mean
from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_source
from fedfuse.data.checks import check_fraction, check_limit
from fedfuse.data.dataset import Dataset
from fedfuse.data.labels import encode_labels
from fedfuse.data.tensors import as_inputs


@register_source("npz")
@dataclass(frozen=True, kw_only=True)
class Npz:
    """Arrays of one ``.npz`` file: inputs and labels.

    Arrays with three or four dimensions are images: channels may come first, last, or be missing for grey. Images of
    whole numbers are divided by 255; floating point numbers are taken as they are. Pickled objects are refused.

    Args:
        path: the file.
        x_key: array of the training inputs.
        y_key: array of the training labels.
        x_test_key: array of the test inputs; there is no test part if neither it nor ``y_test_key`` is in the file.
        y_test_key: array of the test labels.
        test_fraction: share of the training part that becomes the test part where there is none, in [0, 1).
        dataset_name: what to call the data; the file's name where not set.

    Raises:
        ConfigError: a value cannot be used.
    """

    path: str
    x_key: str = "x"
    y_key: str = "y"
    x_test_key: str = "x_test"
    y_test_key: str = "y_test"
    test_fraction: float = 0.0
    dataset_name: str | None = None

    def __post_init__(self) -> None:
        check_fraction("source.test_fraction", self.test_fraction)

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only.
            test_limit: first test rows only.

        Returns:
            Images or a table.

        Raises:
            ConfigError: an array that was set is not there, or a limit is below 1.
            DataError: the file or an array cannot be used.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        path = Path(self.path).expanduser()
        try:
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise DataError(
                        "this is a single array, not an archive of named ones",
                        where=str(path),
                        fix="write it with numpy.savez",
                    )
                dataset = self._dataset(archive, path)
        except FileNotFoundError:
            raise DataError("there is no such file", where=str(path), fix="name an .npz file") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            reason = "it holds pickled objects" if "allow_pickle" in str(error) else str(error)
            raise DataError(
                f"the archive cannot be read: {reason}",
                where=str(path),
                fix="write it with numpy.savez, from arrays of numbers",
            ) from None
        return dataset.with_test_part(self.test_fraction).limited(limit, test_limit)

    def _dataset(self, archive: Any, path: Path) -> Dataset:
        keys = list(archive.files)
        has_test = self.x_test_key in keys or self.y_test_key in keys
        pairs = [("x_key", self.x_key), ("y_key", self.y_key)]
        pairs += [("x_test_key", self.x_test_key), ("y_test_key", self.y_test_key)] if has_test else []
        for setting, key in pairs:
            if key not in keys:
                raise ConfigError(f'{setting}: there is no array "{key}"', where=str(path), fix=did_you_mean(key, keys))
        labels = [np.asarray(archive[key]) for _, key in pairs[1::2]]
        # Labels in one column, shape (n, 1), are common and have one meaning.
        labels = [part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in labels]
        y, y_test, class_names = encode_labels(labels[0], labels[1] if has_test else None, where=str(path))
        inputs = [as_inputs(np.asarray(archive[key]), where=f"{path}, {key}") for _, key in pairs[0::2]]
        (x, is_image), test = inputs[0], None
        if has_test and y_test is not None:
            test = Examples(inputs[1][0], y_test)
        return Dataset(Examples(x, y), test, class_names, is_image=is_image, name=self.dataset_name or path.stem)
