"""Folders of image files, one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedfuse.core.errors import DataError, did_you_mean
from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_source
from fedfuse.data.cache import files_digest
from fedfuse.data.checks import check_fraction, check_limit
from fedfuse.data.dataset import Dataset
from fedfuse.data.images import IMAGE_SUFFIXES, ImageItem, cached_images, check_image_settings, to_unit_range

_TEST_NAMES = ("test", "validation", "valid", "val")


@register_source("image_folder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Image files in ``train/<class>/`` and ``test/<class>/``, or only in ``<class>/``.

    Classes are the names of the folders in sorted order. Files come in turn from each class, so the first rows hold
    all classes. Images are decoded once; their pixels are kept in the cache folder.

    Args:
        path: the folder.
        size: side to resize to, in pixels; not set keeps the images' own, which must then be equal.
        channels: 1 for grey, 3 for colour; not set takes 3 if any image is in colour.
        test_fraction: share of the training part that becomes the test part where there is none, in [0, 1).
        dataset_name: what to call the data; the last part of the path where not set.

    Raises:
        ConfigError: a value cannot be used.
    """

    path: str
    size: int | None = None
    channels: int | None = None
    test_fraction: float = 0.0
    dataset_name: str | None = None

    def __post_init__(self) -> None:
        check_image_settings(self.size, self.channels)
        check_fraction("source.test_fraction", self.test_fraction)

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only; only these are decoded.
            test_limit: first test rows only.

        Returns:
            Images.

        Raises:
            ConfigError: a limit is below 1.
            DataError: there are no images, or they cannot be used.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(
                "there is no such folder", where=str(root), fix="name a folder with one folder of images per class"
            )
        train_root = root / "train" if (root / "train").is_dir() else root
        test_root = next((root / name for name in _TEST_NAMES if train_root != root and (root / name).is_dir()), None)
        class_names = tuple(sorted(name for name, files in _classes(train_root).items() if files))
        if not class_names:
            raise DataError(
                "there are no images",
                where=str(train_root),
                fix="put images into one folder per class, such as train/cat/1.png",
            )
        is_split_later = test_root is None and self.test_fraction > 0
        name = self.dataset_name or root.resolve().name
        train = self._read(train_root, class_names, None if is_split_later else limit)
        test = None if test_root is None else self._read(test_root, class_names, test_limit)
        if test is not None and test.x.shape[1] != train.x.shape[1]:
            raise DataError(
                f"training images have {train.x.shape[1]} channels and test images {test.x.shape[1]}",
                where=name,
                fix="set channels to 1 or 3",
            )
        dataset = Dataset(train, test, class_names, is_image=True, name=name).with_test_part(self.test_fraction)
        return dataset.limited(limit, test_limit) if is_split_later else dataset

    def _read(self, root: Path, class_names: tuple[str, ...], limit: int | None) -> Examples:
        classes = _classes(root)
        for name, found in classes.items():
            if found and name not in class_names:
                raise DataError(
                    f'the class "{name}" has no training images', where=str(root), fix=did_you_mean(name, class_names)
                )
        turns = sorted(
            (turn, class_names.index(name), file) for name, found in classes.items() for turn, file in enumerate(found)
        )
        if not turns:
            raise DataError(
                "there are no images",
                where=str(root),
                fix="put images into one folder per class, or remove this folder",
            )
        files = [file for _, _, file in turns]

        def read(count: int | None) -> Sequence[ImageItem]:
            return files[:count]

        pixels = cached_images(
            files_digest(files),
            read,
            num_images=len(files),
            limit=limit,
            size=self.size,
            channels=self.channels,
            where=str(root),
        )
        labels = np.array([label for _, label, _ in turns], dtype=np.int64)
        return Examples(to_unit_range(pixels), torch.from_numpy(labels)[:limit])


def _classes(root: Path) -> dict[str, list[Path]]:
    """Image files by class, in sorted order; hidden folders and files are no data."""
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return {
        folder.name: sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        for folder in folders
    }
