"""Pictures with captions, as text-to-image models take them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError, did_you_mean
from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_source
from fedfuse.core.seeding import Rng
from fedfuse.data.arrow import ArrowPart, ArrowSettings, class_names_of, column_facts, column_values, is_scalar
from fedfuse.data.arrow_files import file_parts
from fedfuse.data.captions import PLACE, TEMPLATES, caption_tokens, check_templates, class_captions
from fedfuse.data.checks import check_at_least
from fedfuse.data.dataset import Dataset
from fedfuse.data.images import to_unit_range
from fedfuse.data.labels import encode_labels
from fedfuse.data.picture_folders import folder_parts, is_picture_folder
from fedfuse.data.sources.huggingface import HuggingFace
from fedfuse.data.tables import LABEL_NAMES, check_columns
from fedfuse.data.tokenizers import Tokens

ONE_CLASS = "all"
"""The one class of pictures that have none."""


@register_source("captioned")
@dataclass(frozen=True, kw_only=True)
class Captioned(ArrowSettings):
    """Pictures and captions: Parquet files, a folder of image files, or a data set of the Hugging Face hub.

    An input is one row of numbers: the pixels in [-1, 1], channel by channel, then the caption's tokens, -1 where it
    has ended. A label is the picture's class, by which pictures are split over clients and judged.

    A folder of image files has ``train/`` and perhaps ``test/``, and there either a folder per class, or a
    ``metadata.jsonl`` or ``metadata.csv`` whose column ``file_name`` names the files.

    Args:
        path: the file, the folder, or the id on the hub.
        test_path: file or folder of the test part, where it is not found beside the training part.
        caption_column: column of captions; not set makes them from the names of the classes.
        templates: what such captions are made from; one is drawn for each picture.
        caption_seed: draws them.
        tokenizer: ``words`` (a vocabulary of the training captions), ``bytes``, a folder, or an id on the hub.
        max_length: tokens of a caption; longer ones are cut, at least 1.
        classes: names of the classes to keep; empty keeps all. Numbers and names of classes do not change.
        dataset_name: what to call the data; the last part of the path where not set.

    Raises:
        ConfigError: a value cannot be used.
    """

    path: str
    test_path: str | None = None
    caption_column: str | None = None
    templates: tuple[str, ...] = TEMPLATES
    caption_seed: int = 0
    tokenizer: str = "words"
    max_length: int = 77
    classes: tuple[str, ...] = ()
    dataset_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("source.max_length", self.max_length, 1)
        check_templates(self.templates)

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only.
            test_limit: first test rows only.

        Returns:
            Rows of pixels and tokens.

        Raises:
            ConfigError: a column or a class that was set is not there.
            DataError: the data cannot be reached, or its content cannot be used.
        """
        train, test = self._parts()
        name = self.dataset_name or Path(self.path).expanduser().resolve().stem
        if not self.classes:
            return self.dataset(train, test, name, limit, test_limit)
        return self._chosen(self.dataset(train, test, name, None, None)).limited(limit, test_limit)

    def _parts(self) -> tuple[ArrowPart, ArrowPart | None]:
        path = Path(self.path).expanduser()
        is_saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
        # An id on the hub has one slash at most.
        is_id = not path.exists() and self.path.count("/") <= 1 and not path.suffix and self.path[:1] not in ".~/"
        if is_saved or is_id:
            return HuggingFace(name=self.path, test_fraction=self.test_fraction).parts()
        if is_picture_folder(path):
            return folder_parts(path)
        return file_parts(path, None if self.test_path is None else Path(self.test_path).expanduser())

    def _read(
        self, train: ArrowPart, test: ArrowPart | None, name: str, limit: int | None, test_limit: int | None
    ) -> Dataset:
        image, label = self._find_image(train), self._find_class(train)
        if image is None:
            raise ConfigError(
                "there is no column of images",
                where=train.where,
                fix=f"set image_column to one of: {', '.join(train.names)}",
            )
        if self.caption_column is not None:
            check_columns([self.caption_column], train.names, "caption_column", where=train.where)
        elif label is None:
            raise ConfigError(
                "there are neither captions nor classes to make some from",
                where=train.where,
                fix=f"set caption_column or label_column to one of: {', '.join(train.names)}",
            )
        used = [column for column in (image, label, self.caption_column) if column is not None]
        parts = [(train, limit)] if test is None else [(train, limit), (test, test_limit)]
        for part, _ in parts[1:]:
            check_columns(used, part.names, "columns", where=part.where)
        # Classes and words are numbered over all rows, so that they do not change with a limit.
        classes = [_classes(part, label) for part, _ in parts]
        names = class_names_of(train.features.get(label)) if label else ()
        y, y_test, names = encode_labels(classes[0], classes[1] if len(classes) > 1 else None, names, where=name)
        labels = [y] if y_test is None else [y, y_test]
        captions = [self._captions(part, own, names) for (part, _), own in zip(parts, labels, strict=True)]
        words = captions[0] if self.caption_column else [t.replace(PLACE, n) for t in self.templates for n in names]
        tokens = caption_tokens(self.tokenizer, words)
        coded = [
            Examples(_inputs(self._images(part, image, most), tokens, texts[:most], self.max_length), own[:most])
            for (part, most), texts, own in zip(parts, captions, labels, strict=True)
        ]
        kept = [column for column in train.names if column not in used and is_scalar(train, column)]
        table = train.read(kept, limit)
        return Dataset(
            train=coded[0],
            test=coded[1] if len(coded) > 1 else None,
            class_names=names,
            columns={column: column_facts(table, column) for column in kept},
            is_coded=True,
            name=name,
        )

    def _find_class(self, part: ArrowPart) -> str | None:
        """The column of classes, where there is one."""
        if self.label_column is not None:
            check_columns([self.label_column], part.names, "label_column", where=part.where)
            return self.label_column
        typed = [name for name in part.names if class_names_of(part.features.get(name))]
        named = [name for name in LABEL_NAMES if name in part.names and name != self.caption_column]
        return next(iter([*named, *typed[:1]]), None)

    def _captions(self, part: ArrowPart, labels: Tensor, class_names: tuple[str, ...]) -> list[str]:
        if self.caption_column is None:
            return class_captions(labels.numpy(), class_names, self.templates, Rng(self.caption_seed))
        values: list[str] = part.read([self.caption_column], None).column(self.caption_column).to_pylist()
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(
                    f'the column "{self.caption_column}" has no text in row {row}',
                    where=part.where,
                    fix="give every picture a caption, or take the row out",
                )
        return values

    def _chosen(self, dataset: Dataset) -> Dataset:
        """The examples of the classes to keep."""
        numbers = []
        for name in self.classes:
            if name not in dataset.class_names:
                raise ConfigError(
                    f'there is no class "{name}"', where="source.classes", fix=did_you_mean(name, dataset.class_names)
                )
            numbers.append(dataset.class_names.index(name))

        def kept(examples: Examples) -> np.ndarray:
            return np.flatnonzero(np.isin(examples.y.numpy(), numbers))

        rows = kept(dataset.train)
        return dataclasses.replace(
            dataset,
            train=dataset.train.subset(rows),
            test=None if dataset.test is None else dataset.test.subset(kept(dataset.test)),
            columns={name: column[rows] for name, column in dataset.columns.items()},
        )


def _classes(part: ArrowPart, label: str | None) -> np.ndarray:
    if label is None:
        return np.full(part.num_rows, ONE_CLASS)
    return column_values(part.read([label], None), label, part.where)


def _inputs(images: Tensor, tokens: Tokens, captions: list[str], max_length: int) -> Tensor:
    """Pixels in [-1, 1] and token ids, shape ``(n, channels * height * width + max_length)``."""
    pixels = to_unit_range(images).mul_(2).sub_(1).flatten(1)
    return torch.cat([pixels, torch.from_numpy(tokens.encode(captions, max_length))], 1)
